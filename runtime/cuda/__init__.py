"""One graphics card: its kernels, and its Python face."""
