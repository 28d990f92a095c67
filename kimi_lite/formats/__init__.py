"""File containers and block formats, shared by `quantize` and `runtime`; numpy only."""
