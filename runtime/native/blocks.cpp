// Decoding follows the layouts that the `gguf` package documents in gguf/quants.py; tests hold the two together.
#include "blocks.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace kimi {
namespace {

constexpr Block kBlocks[] = {
    {"q4g32", Kind::q4g32, 32, 18, false, false}, {"q4b32", Kind::q4b32, 32, 17, false, false},
    {"q3b32", Kind::q3b32, 32, 13, false, false}, {"q8g32", Kind::q8g32, 32, 34, false, false},
    {"q5g32", Kind::q5g32, 32, 22, false, false}, {"i4g32", Kind::i4g32, 32, 18, false, false},
    {"q4k", Kind::q4k, 256, 148, false, true},    {"q6k", Kind::q6k, 256, 210, true, false},
    {"F32", Kind::F32, 1, 4, false, false},       {"F16", Kind::F16, 1, 2, false, false},
    {"BF16", Kind::BF16, 1, 2, false, false},     {"Q4_0", Kind::Q4_0, 32, 18, false, false},
    {"Q4_1", Kind::Q4_1, 32, 20, false, true},    {"Q5_0", Kind::Q5_0, 32, 22, false, false},
    {"Q5_1", Kind::Q5_1, 32, 24, false, true},    {"Q8_0", Kind::Q8_0, 32, 34, false, false},
    {"IQ4_NL", Kind::IQ4_NL, 32, 18, false, false}, {"IQ4_XS", Kind::IQ4_XS, 256, 136, false, false},
    {"Q4_K", Kind::Q4_K, 256, 144, false, true},  {"Q5_K", Kind::Q5_K, 256, 176, false, true},
    {"Q6_K", Kind::Q6_K, 256, 210, true, false},
};

float half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  uint32_t bits;
  float f;
  if (exponent == 0) {
    f = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  std::memcpy(&f, &bits, 4);
  return f;
}

// One row's 32 channels: values, scales of the two halves, offset.
struct Group {
  int8_t q[32];
  float scale[2], offset;
};

void nibbles(const uint8_t* qs, int8_t* q) {  // low halves are channels 0-15, high halves 16-31
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<int8_t>(qs[i] & 15);
    q[i + 16] = static_cast<int8_t>(qs[i] >> 4);
  }
}

void fifth_bits(const uint8_t* qh, int8_t* q) {
  uint32_t bits;
  std::memcpy(&bits, qh, 4);
  for (int i = 0; i < 32; ++i) q[i] = static_cast<int8_t>(q[i] | ((bits >> i & 1) << 4));
}

// The 6-bit scale and minimum of sub-block j of a K-quant, from 12 packed bytes.
void k_scale(const uint8_t* s, int j, int* scale, int* minimum) {
  if (j < 4) {
    *scale = s[j] & 63;
    *minimum = s[j + 4] & 63;
  } else {
    *scale = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4);
    *minimum = (s[j + 4] >> 4) | (s[j] >> 6 << 4);
  }
}

// Group g (32 channels) of a row.
void decode_group(Kind kind, const uint8_t* row, int g, Group* out) {
  out->offset = 0;
  switch (kind) {
    case Kind::Q4_0: {
      const uint8_t* b = row + 18 * g;
      out->scale[0] = half(b);
      nibbles(b + 2, out->q);
      for (int8_t& q : out->q) q = static_cast<int8_t>(q - 8);
      break;
    }
    case Kind::Q4_1: {
      const uint8_t* b = row + 20 * g;
      out->scale[0] = half(b);
      out->offset = half(b + 2);
      nibbles(b + 4, out->q);
      break;
    }
    case Kind::Q5_0: {
      const uint8_t* b = row + 22 * g;
      out->scale[0] = half(b);
      nibbles(b + 6, out->q);
      fifth_bits(b + 2, out->q);
      for (int8_t& q : out->q) q = static_cast<int8_t>(q - 16);
      break;
    }
    case Kind::Q5_1: {
      const uint8_t* b = row + 24 * g;
      out->scale[0] = half(b);
      out->offset = half(b + 2);
      nibbles(b + 8, out->q);
      fifth_bits(b + 4, out->q);
      break;
    }
    case Kind::Q8_0: {
      const uint8_t* b = row + 34 * g;
      out->scale[0] = half(b);
      std::memcpy(out->q, b + 2, 32);
      break;
    }
    case Kind::IQ4_NL: {
      const uint8_t* b = row + 18 * g;
      out->scale[0] = half(b);
      nibbles(b + 2, out->q);
      for (int8_t& q : out->q) q = kNonLinear[q];
      break;
    }
    case Kind::IQ4_XS: {
      const uint8_t* b = row + 136 * (g / 8);
      const int j = g % 8;
      uint16_t high;
      std::memcpy(&high, b + 2, 2);
      const int scale = ((b[4 + j / 2] >> (4 * (j % 2)) & 15) | ((high >> (2 * j) & 3) << 4)) - 32;
      out->scale[0] = half(b) * static_cast<float>(scale);
      nibbles(b + 8 + 16 * j, out->q);
      for (int8_t& q : out->q) q = kNonLinear[q];
      break;
    }
    case Kind::Q4_K:
    case Kind::Q5_K: {
      const bool five = kind == Kind::Q5_K;
      const uint8_t* b = row + (five ? 176 : 144) * (g / 8);
      const int j = g % 8;
      int scale, minimum;
      k_scale(b + 4, j, &scale, &minimum);
      out->scale[0] = half(b) * static_cast<float>(scale);
      out->offset = -(half(b + 2) * static_cast<float>(minimum));
      const uint8_t* qs = b + (five ? 48 : 16) + 32 * (j / 2);
      for (int i = 0; i < 32; ++i) {
        int q = j % 2 ? qs[i] >> 4 : qs[i] & 15;
        if (five) q |= (b[16 + i] >> j & 1) << 4;
        out->q[i] = static_cast<int8_t>(q);
      }
      break;
    }
    case Kind::Q6_K: {
      const uint8_t* b = row + 210 * (g / 8);
      const int part = g % 8 / 4, j = g % 4;  // 128 channels each; within a part, 32 each
      const uint8_t* ql = b + 64 * part + 32 * (j % 2);
      const uint8_t* qh = b + 128 + 32 * part;
      const auto* scales = reinterpret_cast<const int8_t*>(b + 192 + 8 * part + 2 * j);
      for (int i = 0; i < 32; ++i) {
        const int low = j / 2 ? ql[i] >> 4 : ql[i] & 15;
        out->q[i] = static_cast<int8_t>((low | ((qh[i] >> (2 * j) & 3) << 4)) - 32);
      }
      const float d = half(b + 208);
      out->scale[0] = d * static_cast<float>(scales[0]);
      out->scale[1] = d * static_cast<float>(scales[1]);
      return;
    }
    default:
      break;
  }
  out->scale[1] = out->scale[0];
}

}  // namespace

const Block& block_of(Kind kind) { return kBlocks[static_cast<int>(kind)]; }

const Block& block_named(const char* name) {
  for (const Block& block : kBlocks)
    if (std::strcmp(block.name, name) == 0) return block;
  throw std::invalid_argument(std::string("no kernel reads weights of type ") + name);
}

void decode_panel(const Block& block, const uint8_t* data, int rows, int columns, int first, PanelRun* panel) {
  const size_t row_bytes = static_cast<size_t>(columns / block.elements) * block.bytes;
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < columns / kGroup; ++g) {
      Group group{};
      if (first + r < rows) decode_group(block.kind, data + (first + r) * row_bytes, g, &group);
      PanelRun& run = panel[g];
      for (int j = 0; j < 8; ++j) std::memcpy(run.q + 64 * j + 4 * r, group.q + 4 * j, 4);
      run.scale[0][r] = group.scale[0];
      run.scale[1][r] = group.scale[1];
      run.offset[r] = group.offset;
    }
  }
}

const char* packed_as(Kind kind) {
  switch (kind) {
    case Kind::Q4_0: return "q4g32";
    case Kind::Q8_0: return "q8g32";
    case Kind::Q5_0: return "q5g32";
    case Kind::IQ4_NL: return "i4g32";
    case Kind::Q4_K: return "q4k";
    case Kind::Q6_K: return "q6k";
    default: return nullptr;
  }
}

namespace {
uint64_t eight(const uint8_t* p) {
  uint64_t x;
  std::memcpy(&x, p, 8);
  return x;
}
uint32_t four(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
constexpr uint64_t kNibbles = 0x0f0f0f0f0f0f0f0f;

// Line p of row r from the nibbles of channels 8p..8p+7, a byte each: four low, four high.
void put(uint8_t* run, int p, int r, uint64_t channels) {
  const uint32_t line = static_cast<uint32_t>(channels) | static_cast<uint32_t>(channels >> 32) << 4;
  std::memcpy(run + 64 * p + 4 * r, &line, 4);
}
}  // namespace

// Bytes are moved eight at a time; all shifts stay within their byte. (Little-endian, as every processor we run on.)
void pack_block(const Block& block, const uint8_t* data, int rows, int columns, int b, uint8_t* out) {
  const Kind kind = block.kind;
  const bool wide = kind == Kind::Q4_K || kind == Kind::Q6_K;  // blocks of 256
  const int run_bytes = kind == Kind::Q8_0 ? kQ8Run : kind == Kind::Q5_0 ? kQ5Run : kind == Kind::Q6_K ? kQ6KRun : kQ4Run;
  const int head_bytes = kind == Kind::Q4_K ? kQ4KHead : kind == Kind::Q6_K ? kQ6KHead : 0;
  const size_t row_bytes = static_cast<size_t>(columns / block.elements) * block.bytes;
  for (int r = 0; r < kRows; ++r) {
    const int row = b * kRows + r;
    for (int g = 0; g < columns / kGroup; ++g) {
      uint8_t* head = out + static_cast<size_t>(g / 8) * (head_bytes + 8 * run_bytes);  // of 256 channels
      uint8_t* run = head + head_bytes + g % 8 * run_bytes;
      static const uint8_t zeros[256] = {};  // past the end: scale 0, whatever the values
      const uint8_t* from = row < rows ? data + row * row_bytes + static_cast<size_t>(wide ? g / 8 : g) * block.bytes : zeros;
      switch (kind) {
        case Kind::Q8_0:
          for (int j = 0; j < 8; ++j) std::memcpy(run + 64 * j + 4 * r, from + 2 + 4 * j, 4);
          std::memcpy(run + 512 + 2 * r, from, 2);
          break;
        case Kind::Q4_0:
        case Kind::IQ4_NL:
        case Kind::Q5_0: {
          const bool five = kind == Kind::Q5_0;
          for (int k = 0; k < 2; ++k) {  // low halves are channels 0-15, high halves 16-31
            const uint64_t bytes = eight(from + (five ? 6 : 2) + 8 * k);
            put(run, k, r, bytes & kNibbles);
            put(run, 2 + k, r, bytes >> 4 & kNibbles);
          }
          if (five) {
            const uint32_t bits = four(from + 2);  // bit i is channel i's; byte c gathers those of 4j + c in order of j
            for (int c = 0; c < 4; ++c) {
              uint32_t x = bits >> c & 0x11111111u;
              x = (x | x >> 3) & 0x03030303u;
              x = (x | x >> 6) & 0x000f000fu;
              run[256 + 4 * r + c] = static_cast<uint8_t>(x | x >> 12);
            }
          }
          std::memcpy(run + run_bytes - 32 + 2 * r, from, 2);
          break;
        }
        case Kind::Q4_K: {
          for (int p = 0; p < 4; ++p) {
            const uint64_t bytes = eight(from + 16 + 32 * (g % 8 / 2) + 8 * p);
            put(run, p, r, (g % 2 ? bytes >> 4 : bytes) & kNibbles);
          }
          int scale, minimum;
          k_scale(from + 4, g % 8, &scale, &minimum);
          run[256 + r] = static_cast<uint8_t>(scale);
          run[272 + r] = static_cast<uint8_t>(minimum);
          std::memcpy(head + 2 * r, from, 2);
          std::memcpy(head + 32 + 2 * r, from + 2, 2);
          break;
        }
        default: {  // Q6_K
          const int part = g % 8 / 4, j = g % 4;
          for (int p = 0; p < 4; ++p) {
            const uint64_t bytes = eight(from + 64 * part + 32 * (j % 2) + 8 * p);
            put(run, p, r, (j / 2 ? bytes >> 4 : bytes) & kNibbles);
          }
          for (int half = 0; half < 2; ++half) {
            uint32_t upper = 0;
            for (int k = 0; k < 4; ++k)
              upper |= (four(from + 128 + 32 * part + 16 * half + 4 * k) >> (2 * j) & 0x03030303u) << (2 * k);
            std::memcpy(run + 256 + 64 * half + 4 * r, &upper, 4);
            run[384 + 16 * half + r] = from[192 + 2 * (g % 8) + half];
          }
          std::memcpy(head + 2 * r, from + 208, 2);
        }
      }
    }
  }
}

void decode_float_row(Kind kind, const uint8_t* row, int columns, float* out) {
  if (kind == Kind::F32) {
    std::memcpy(out, row, 4 * static_cast<size_t>(columns));
    return;
  }
  for (int k = 0; k < columns; ++k) {
    if (kind == Kind::F16) {
      out[k] = half(row + 2 * k);
      continue;
    }
    uint16_t h;
    std::memcpy(&h, row + 2 * k, 2);
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    std::memcpy(out + k, &bits, 4);
  }
}

}  // namespace kimi
