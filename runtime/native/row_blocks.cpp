#include "row_blocks.h"

#include <algorithm>

namespace kimi {
namespace {

// Row block b of a ggml type that has no packed layout, decoded.
const PanelRun* panel_of(const Weights& w, int b) {
  PanelRun* panel = scratch.panel.get(w.columns / kGroup);
  decode_panel(*w.block, w.data, w.rows, w.columns, b * kRows, panel);
  return panel;
}
Form panel_form(const Weights& w) {
  return w.block->halves ? Form::panel_halves : w.block->offsets ? Form::panel_offsets : Form::panel;
}

// Row block b of w, whose layout is not packed, times all tokens: out[i * stride + row].
void row_block(const Weights& w, int b, const Operand& x, float* out, size_t stride) {
  switch (w.block->kind) {
    case Kind::F32:
    case Kind::F16:
    case Kind::BF16: {
      const size_t row_bytes = static_cast<size_t>(w.columns) * w.block->bytes;
      const int n = std::min(kRows, w.rows - b * kRows);
      float* weights = scratch.row.get(static_cast<size_t>(n) * w.columns);
      const float* rows[kRows];
      for (int r = 0; r < n; ++r) {
        const uint8_t* stored = w.data + (b * kRows + r) * row_bytes;
        float* row = weights + static_cast<size_t>(r) * w.columns;
        if (w.block->kind == Kind::F16) kernels().half_to_float(reinterpret_cast<const uint16_t*>(stored), w.columns, row);
        else decode_float_row(w.block->kind, stored, w.columns, row);
        rows[r] = row;
      }
      const float** tokens = scratch.tokens.get(x.n);
      for (int i = 0; i < x.n; ++i) tokens[i] = x.x + x.tokens[i] * x.x_stride;
      kernels().dots(tokens, x.n, rows, n, w.columns, out, stride);
      for (int i = 0; i < x.n; ++i) std::fill(out + i * stride + n, out + i * stride + kRows, 0.0f);
      return;
    }
    default: {
      const PanelRun* panel = panel_of(w, b);
      Blocks blocks;
      blocks.add(panel, panel, out);
      blocks.multiply(panel_form(w), x, stride);
    }
  }
}

}  // namespace

void Blocks::multiply(Form form, const Operand& x, size_t stride) const {
  const size_t size = token_bytes(x.columns);
  const BlocksKernel kernel = kernels().blocks[static_cast<int>(form)];
  if (x.for_many) return kernels().many[static_cast<int>(form)](these, next, n, x.tiles, x.columns / kGroup, x.n, out, stride);
  for (int first = 0, W; first < x.n; first += W) {
    W = tile_width(x.n, first);
    float* to[kMostBlocks];
    for (int i = 0; i < n; ++i) to[i] = out[i] + first * stride;
    kernel(these, next, n, x.tiles + first * size, x.columns / kGroup, W, to, stride);
  }
}

Weights rows_of(const Weights& w, int first, int n) {
  const size_t row_bytes = static_cast<size_t>(w.columns) / w.block->elements * w.block->bytes;
  const size_t skipped = is_packed(w.block->kind) ? first / kRows * w.stride : first * row_bytes;
  return {w.block, w.data + skipped, w.stride, n, w.columns};
}

void turned_block(const Weights& w, int b, float* out, size_t stride) {
  const int groups = w.columns / kGroup;
  if (is_packed(w.block->kind)) {
    kernels().turned[static_cast<int>(packed_form(w))](w.data + b * w.stride, groups, out, stride);
  } else if (is_float(w)) {
    float* row = scratch.row.get(w.columns);
    for (int r = 0; r < kRows; ++r) {
      decode_float_row(w.block->kind, w.data + static_cast<size_t>(b * kRows + r) * w.columns * w.block->bytes, w.columns, row);
      for (int k = 0; k < w.columns; ++k) out[k * stride + r] = row[k];
    }
  } else {
    const PanelRun* panel = panel_of(w, b);
    kernels().turned[static_cast<int>(panel_form(w))](reinterpret_cast<const uint8_t*>(panel), groups, out, stride);
  }
}

int long_task(int blocks) {
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
