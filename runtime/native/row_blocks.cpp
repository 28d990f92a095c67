#include "row_blocks.h"

#include <algorithm>

namespace kimi {
namespace {

bool on_amd() {
#if defined(__x86_64__) || defined(_M_X64)
  static const bool is = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  return is;
#else
  return false;
#endif
}

// Row block b of w, whose layout is not packed, times all tokens: out[i * stride + row].
void row_block(const Weights& w, int b, const Operand& x, float* out, size_t stride) {
  switch (w.block->kind) {
    case Kind::F32:
    case Kind::F16:
    case Kind::BF16: {
      const size_t row_bytes = static_cast<size_t>(w.columns) * w.block->bytes;
      float* weights = scratch.row.get(w.columns);
      for (int r = 0; r < kRows; ++r) {
        const int row = b * kRows + r;
        const uint8_t* stored = w.data + row * row_bytes;
        if (row < w.rows && w.block->kind == Kind::F16)
          kernels().half_to_float(reinterpret_cast<const uint16_t*>(stored), w.columns, weights);
        else if (row < w.rows)
          decode_float_row(w.block->kind, stored, w.columns, weights);
        for (int i = 0; i < x.n; ++i)
          out[i * stride + r] = row < w.rows ? kernels().dot(weights, x.x + x.tokens[i] * x.x_stride, w.columns) : 0;
      }
      return;
    }
    default: {
      PanelRun* panel = scratch.panel.get(w.columns / kGroup);
      decode_panel(*w.block, w.data, w.rows, w.columns, b * kRows, panel);
      const Form form = w.block->halves ? Form::panel_halves : w.block->offsets ? Form::panel_offsets : Form::panel;
      Blocks blocks;
      blocks.add(panel, panel, out);
      blocks.multiply(form, x, stride);
    }
  }
}

}  // namespace

void Blocks::multiply(Form form, const Operand& x, size_t stride) const {
  const size_t size = token_bytes(x.columns);
  const BlocksKernel streamed = x.n == 1 && n > kPair && on_amd() ? kernels().one_stream[static_cast<int>(form)] : nullptr;
  const BlocksKernel kernel = streamed ? streamed : kernels().blocks[static_cast<int>(form)];
  for (int first = 0, W; first < x.n; first += W) {
    W = tile_width(x.n, first);
    float* to[kMostBlocks];
    for (int i = 0; i < n; ++i) to[i] = out[i] + first * stride;
    kernel(these, next, n, x.tiles + first * size, x.columns / kGroup, W, to, stride);
  }
}

int blocks_of_one(int blocks) {
  int n = kMostBlocks;
  while (n > kPair && blocks < 3 * n * pool().n_threads()) n /= 2;
  return n;
}

const int32_t* counting(int n) {
  static std::vector<int32_t> numbers;
  for (int i = static_cast<int>(numbers.size()); i < n; ++i) numbers.push_back(i);
  return numbers.data();
}

void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride, const Weights& following, int then) {
  for (int n = 1; from < to; from += n, out += n * kRows) {
    if (!is_packed(w.block->kind)) {
      row_block(w, from, x, out, stride);
      continue;
    }
    n = std::min(x.n == 1 ? kMostBlocks : kPair, to - from);
    Blocks blocks;
    if (from + n < to) blocks.add(w, from, from + n, w, from + n, out);
    else blocks.add(w, from, from + n, following, then, out);
    blocks.multiply(packed_form(w), x, stride);
  }
}
void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride) {
  row_blocks(w, from, to, x, out, stride, w, to);
}

}  // namespace kimi
