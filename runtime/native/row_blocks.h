// Row blocks times activations: what every product of a matrix comes down to inside one task. ops.cpp and experts.cpp cut the
// work into such tasks; expanded.cpp turns matrices round with it.
#pragma once
#include "ops.h"

namespace kimi {

inline bool is_float(const Weights& w) { return w.block->elements == 1; }
inline int blocks_of(int rows) { return (rows + kRows - 1) / kRows; }
inline Form packed_form(const Weights& w) { return static_cast<Form>(w.block->kind); }  // Kind and Form list them in one order

// n rows of activations as the kernels take them: quantized, in tiles, alone or `for_many`; and as the floats they were, for matrices
// stored as floats, which multiply the rows of x that `tokens` lists.
struct Operand {
  const uint8_t* tiles;
  int n, columns;
  const float* x;
  size_t x_stride;       // floats from row to row
  const int32_t* tokens;
  bool for_many = false;
};
// Does w meet n tokens by the kernels' way for many?
inline bool many_meet(const Weights& w, int n) {
  return is_packed(w.block->kind) && kernels().many[static_cast<int>(packed_form(w))] && n >= kernels().many_from;
}
// Tokens first..first+W among n of so many columns, whose tiles begin at `tiles`.
inline Tile tile_of(uint8_t* tiles, int n, int columns, bool for_many, int first, int W) {
  return for_many ? Tile(tiles + first * kTokenGroup, W, n) : Tile(tiles + first * token_bytes(columns), W);
}

struct Scratch {  // per thread
  Buffer<PanelRun> panel;
  Buffer<float> row, out, more;
  Buffer<const float*> tokens;
  Buffer<uint8_t> tile;
};
inline thread_local Scratch scratch;

// Row blocks of one shape and layout, which are multiplied side by side.
struct Blocks {
  const void *these[kMostBlocks], *next[kMostBlocks];
  float* out[kMostBlocks];
  int n = 0;

  // Row blocks from..to of w into out; those of `following` from `then` on are likely to come after all that is added.
  void add(const Weights& w, int from, int to, const Weights& following, int then, float* to_out) {
    for (; from < to; ++from, ++then, to_out += kRows) add(w.data + from * w.stride, following.data + then * following.stride, to_out);
  }
  void add(const void* block, const void* following, float* to_out) {
    these[n] = block, next[n] = following, out[n] = to_out;
    ++n;
  }
  // Each times all tokens of x: to out[i] + t * stride.
  void multiply(Form form, const Operand& x, size_t stride) const;
};

// n rows of w from `first` on, a matrix of their own; both in whole row blocks.
Weights rows_of(const Weights& w, int first, int n);
// The 16 rows of row block b as floats, turned round: channel k of row r to out[k * stride + r]. w has no rows beyond its blocks.
void turned_block(const Weights& w, int b, float* out, size_t stride);
// How many of so many row blocks a task takes that is best a long one: as many as go side by side, if that leaves each thread a few tasks.
int long_task(int blocks);
// 0, 1, ... n - 1. Only the calling thread asks, between tasks.
const int32_t* counting(int n);
// Row blocks from..to of w times all tokens: out[i * stride + row], counted from the first block's first row. After them, those
// of `following` from `then` on are likely to come; without it, those of w.
void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride, const Weights& following, int then);
void row_blocks(const Weights& w, int from, int to, const Operand& x, float* out, size_t stride);

}  // namespace kimi
