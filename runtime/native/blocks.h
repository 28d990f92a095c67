// ggml's block types, decoded from the file's bytes where they lie.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace kimi {

enum class Kind { q4g32, q4b32, q3b32, q8g32, q5g32, i4g32, q4k, q6k, F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, IQ4_XS, Q4_K, Q5_K, Q6_K };

struct Block {
  const char* name;
  Kind kind;
  int elements, bytes;
  bool halves, offsets;  // 16-wide scales; a minimum besides the scale
};
const Block& block_of(Kind kind);
inline bool is_packed(Kind kind) { return kind <= Kind::q6k; }
const Block& block_named(const char* name);  // throws std::invalid_argument

// Rows first..first+15 of a matrix with `rows` rows of `columns` weights into a panel [columns / 32]; rows past the end
// become zeros.
void decode_panel(const Block& block, const uint8_t* data, int rows, int columns, int first, PanelRun* panel);
// Row block b of a ggml matrix in its packed layout (packed_as), losslessly; rows past the end become zeros.
void pack_block(const Block& block, const uint8_t* data, int rows, int columns, int b, uint8_t* out);
const char* packed_as(Kind kind);  // null: the type has no packed layout
// One row of F32, F16 or BF16 as floats.
void decode_float_row(Kind kind, const uint8_t* row, int columns, float* out);
}  // namespace kimi
