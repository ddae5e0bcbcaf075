// A matrix product on one thread by the matrix unit of Intel's CPUs (AMX), as exact as by vectors.
//
// The unit multiplies bfloat16 and adds in float32.  A float32 has 24 bits, three times as many as
// a bfloat16: a number is the sum of a high, a middle and a low part, and of the nine products of
// parts six reach the bits that a float32 has.  XLA calls that BF16_BF16_F32_X6 and does so on TPUs
// where the highest precision is asked for.  (Henry, Tang, Heinecke, "Leveraging the bfloat16
// Artificial Intelligence Datatype For Higher-Precision Computations", 2019.)
//
// Both sides are split and copied, in pieces that stay in the second-level cache.  Infinity comes
// out as NaN, and what is below 1e-38 as zero.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define DYNMOE_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "sides.h"
#include "vectors.h"

namespace dynmoe {

// With fewer rows vectors are faster: both sides are copied, and what is copied is used too little.
constexpr int64_t kRowsForAmx = 32;

// A register of the unit is 16 rows of 16 pairs of bfloat16, of which a pair is one after the other
// in depth, 16 apart.
constexpr int64_t kSide = 16;
constexpr int64_t kPairs = kSide * kSide;
constexpr int64_t kParts = 3;
constexpr int64_t kSplit = kParts * kPairs;  // numbers of memory that 16 x 32 split ones take
constexpr int64_t kDeep = 2 * kSide;         // of the depth, in a register
static_assert(kSide == kLanes);

// Pieces of the sides that stay in the second-level cache: 72 kB of A, 576 kB of B.  What 16 lines
// of either have stays in the first.
constexpr int64_t kAmxHeight = 64, kAmxDepth = 192, kAmxColumns = kColumnsOfTask;

// Numbers of memory that a split side takes.
constexpr int64_t split_size(int64_t lines, int64_t depth) {
  return blocks(lines, kSide) * blocks(depth, kDeep) * kSplit;
}

// The kernel gives a process the unit's registers when it asks for them.
inline bool may_use_amx() {
  constexpr int kRequest = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTiles) == 0;
  return granted;
}

// The three parts of 16 pairs, kPairs apart.
inline void split(Vector first, Vector second, float* to) {
  typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
  for (int part = 0; part < kParts; part++) {
    Bits a, b;
    std::memcpy(&a, &first, sizeof a);
    std::memcpy(&b, &second, sizeof b);
    if (part + 1 < kParts) {  // to the nearest; what is left in the end has few enough bits
      a += 0x8000;
      b += 0x8000;
    }
    a &= 0xffff0000;
    b &= 0xffff0000;
    const Bits pairs = (a >> 16) | b;
    std::memcpy(to + part * kPairs, &pairs, sizeof pairs);
    Vector rounded;
    std::memcpy(&rounded, &a, sizeof a);
    first -= rounded;
    std::memcpy(&rounded, &b, sizeof b);
    second -= rounded;
  }
}

// Three registers of 16 lines and 32 of the depth, which begin at `from`.
template <bool kAlong, bool kTurn>
void split_block(const float* from, int64_t stride, int64_t lines, int64_t depth, float* to) {
  const auto row = [&](int64_t r, int64_t half) {
    const int64_t line = kAlong ? r : 0, deep = kAlong ? half : half + r;
    if (line >= lines || deep >= depth) return Vector{};
    return kAlong ? load(from + line * stride + deep, depth - deep)
                  : load(from + deep * stride + line, lines - line);
  };
  if constexpr (kTurn) {
    Vector first[kSide], second[kSide];
    for (int64_t r = 0; r < kSide; r++) first[r] = row(r, 0);
    for (int64_t r = 0; r < kSide; r++) second[r] = row(r, kSide);
    transpose(first);
    transpose(second);
    for (int64_t r = 0; r < kSide; r++) split(first[r], second[r], to + r * kSide);
  } else {
    for (int64_t r = 0; r < kSide; r++) split(row(r, 0), row(r, kSide), to + r * kSide);
  }
}

// Splits a matrix whose lines lie along the depth, or, if not, across it: for each 16 lines and 32
// of the depth three registers.  Their rows are lines, or, if turned, pairs.
template <bool kAlong, bool kTurn>
void split_lines(const float* from, int64_t stride, int64_t lines, int64_t depth, float* to) {
  const auto block = [&](int64_t i, int64_t k) {
    split_block<kAlong, kTurn>(from + (kAlong ? i * stride + k : k * stride + i), stride, lines - i,
                               depth - k, to + split_size(i, depth) + k / kDeep * kSplit);
  };
  // As it lies in memory.
  if constexpr (kAlong)
    for (int64_t i = 0; i < lines; i += kSide)
      for (int64_t k = 0; k < depth; k += kDeep) block(i, k);
  else
    for (int64_t k = 0; k < depth; k += kDeep)
      for (int64_t i = 0; i < lines; i += kSide) block(i, k);
}

struct alignas(64) AmxRegisters {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr AmxRegisters kAmxRegisters;

// c[16, 16] = or += a[16, depth] b[depth, 16] of split sides.  Register 0 has the sums, 1 a part of
// A, 2 one of B.
//
// No more than these three of the unit's eight registers hold anything.  On a busy core, as if its
// other thread used the unit too, only what is left empty seems free to load one operand behind the
// products of another (docs/measurements.md: cpu-matrix-unit).
inline void amx_tile(int64_t depth, const float* a, const float* b, float* c, int64_t c_stride,
                     bool add) {
  asm volatile("" ::: "memory");  // the sides have been written: the compiler doesn't see loads
  const int64_t row = 64, bytes = c_stride * sizeof(float);
  constexpr int64_t high = 0, middle = kPairs, low = 2 * kPairs;
  _tile_zero(0);
  if (add) _tile_loadd(0, c, bytes);
  for (const float* end = a + split_size(kSide, depth); a < end; a += kSplit, b += kSplit) {
    const auto of_a = [&](int64_t part) { _tile_loadd(1, a + part, row); };
    const auto of_b = [&](int64_t part) { _tile_loadd(2, b + part, row); };
    const auto multiply = [] { _tile_dpbf16ps(0, 1, 2); };
    // Of neighbours one side is the same: 7 loads for 6 products.
    of_a(low), of_b(high), multiply();
    of_a(middle), multiply();
    of_b(middle), multiply();
    of_a(high), multiply();
    of_b(low), multiply();
    of_b(high), multiply();
  }
  _tile_stored(0, c, bytes);
}

// The same where c has fewer rows or columns.
inline void narrow_amx_tile(int64_t rows, int64_t columns, int64_t depth, const float* a,
                            const float* b, float* c, int64_t c_stride, bool add) {
  alignas(64) float whole[kPairs];
  amx_tile(depth, a, b, whole, kSide, false);
  for (int64_t r = 0; r < rows; r++) {
    float* to = c + r * c_stride;
    const Vector sums = load(whole + r * kSide);
    store(to, add ? load(to, columns) + sums : sums, columns);
  }
}

// c[rows, columns] = or += a[rows, depth] b[depth, columns]
template <bool kATurned, bool kBTurned>
void product_by_amx(int64_t rows, int64_t columns, int64_t depth, Side<kATurned> a,
                    Side<kBTurned> b, float* c, int64_t c_stride, bool add) {
  thread_local Memory memory[2];
  float* a_split = memory[0].hold(split_size(kAmxHeight, kAmxDepth));
  float* b_split = memory[1].hold(split_size(kAmxColumns, kAmxDepth));
  _tile_loadconfig(&kAmxRegisters);
  for (int64_t j0 = 0; j0 < columns; j0 += kAmxColumns) {
    const int64_t width = std::min(kAmxColumns, columns - j0);
    for (int64_t k0 = 0; k0 < depth; k0 += kAmxDepth) {
      const int64_t deep = std::min(kAmxDepth, depth - k0);
      const bool more = add || k0 > 0;
      split_lines<kBTurned, kBTurned>(b.at(k0, j0), b.stride, width, deep, b_split);
      for (int64_t i0 = 0; i0 < rows; i0 += kAmxHeight) {
        const int64_t height = std::min(kAmxHeight, rows - i0);
        split_lines<!kATurned, kATurned>(a.at(i0, k0), a.stride, height, deep, a_split);
        for (int64_t i = 0; i < height; i += kSide)
          for (int64_t j = 0; j < width; j += kSide) {
            const float* a_tile = a_split + split_size(i, deep);
            const float* b_tile = b_split + split_size(j, deep);
            float* to = c + (i0 + i) * c_stride + j0 + j;
            const int64_t n = std::min(kSide, height - i), m = std::min(kSide, width - j);
            if (n == kSide && m == kSide)
              amx_tile(deep, a_tile, b_tile, to, c_stride, more);
            else
              narrow_amx_tile(n, m, deep, a_tile, b_tile, to, c_stride, more);
          }
      }
    }
  }
  _tile_release();  // registers that hold nothing need not be kept when threads change
}

}  // namespace dynmoe

#endif
