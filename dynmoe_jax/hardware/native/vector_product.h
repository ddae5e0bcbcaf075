// A matrix product on one thread by vectors: the inner loop is a tile of C in registers.
//
// B is copied into panels as wide as a tile, in pieces that stay in the second-level cache; A is
// read where it lies, unless it is turned.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "memory.h"
#include "sides.h"
#include "vectors.h"

namespace dynmoe {

constexpr int64_t kPanel = kLanes * kTileVectors;  // columns of a tile
constexpr int64_t kDepth = 256;                    // of a piece of B, then of 256 kB
constexpr int64_t kHeight = 16 * kTileRows;        // of a piece of A, if it is copied

// c[kRows, kPanel] = or += a[kRows, depth] panel[depth, kPanel]
template <int kRows, bool kCopied>
void tile(int64_t depth, const float* __restrict a, int64_t a_stride, const float* __restrict panel,
          float* __restrict c, int64_t c_stride, bool add) {
  // Needed in the end, by then it is here.
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kTileVectors; v++) __builtin_prefetch(c + r * c_stride + v * kLanes, 1);
  Vector sums[kRows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; k++) {
    Vector row[kTileVectors];
    for (int v = 0; v < kTileVectors; v++) row[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const Vector number = filled(kCopied ? a[r] : a[r * a_stride]);
      for (int v = 0; v < kTileVectors; v++) sums[r][v] += number * row[v];
    }
    panel += kPanel;
    a += kCopied ? kTileRows : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kTileVectors; v++) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

using TileKernel = void (*)(int64_t, const float*, int64_t, const float*, float*, int64_t, bool);

template <bool kCopied, int... i>
TileKernel tile_of(int rows, std::integer_sequence<int, i...>) {
  static constexpr TileKernel tiles[] = {tile<i + 1, kCopied>...};
  return tiles[rows - 1];
}

// The same for the last columns, of which there are fewer than a panel has.
inline void narrow_tile(TileKernel tile, int64_t rows, int64_t columns, int64_t depth,
                        const float* a, int64_t a_stride, const float* panel, float* c,
                        int64_t c_stride, bool add) {
  float whole[kTileRows * kPanel];
  tile(depth, a, a_stride, panel, whole, kPanel, false);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < columns; j++) {
      float* to = c + r * c_stride + j;
      *to = add ? *to + whole[r * kPanel + j] : whole[r * kPanel + j];
    }
}

// b[depth, columns] as panels [depth, kPanel], the last one filled up with zeros.
inline void copy_panels(const float* b, int64_t stride, int64_t depth, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += kPanel)
    for (int64_t k = 0; k < depth; k++, to += kPanel)
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const int64_t rest = std::max<int64_t>(0, columns - j - v);
        store(to + v, load(b + k * stride + j + v, rest));
      }
}

// The same of b stored as [columns, depth].
inline void turn_panels(const float* b, int64_t stride, int64_t depth, int64_t columns, float* to) {
  Vector rows[kLanes];
  for (int64_t j = 0; j < columns; j += kPanel, to += kPanel * depth)
    for (int64_t v = 0; v < kPanel; v += kLanes)
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t deep = std::min<int64_t>(kLanes, depth - k);
        for (int64_t i = 0; i < kLanes; i++)
          rows[i] = j + v + i < columns ? load(b + (j + v + i) * stride + k, deep) : Vector{};
        transpose(rows);
        for (int64_t i = 0; i < deep; i++) store(to + (k + i) * kPanel + v, rows[i]);
      }
}

// a stored as [depth, rows], as groups [depth, kTileRows] of rows.
inline void copy_groups(const float* a, int64_t stride, int64_t depth, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, rows - i);
    for (int64_t k = 0; k < depth; k++, to += kTileRows) {
      const float* from = a + k * stride + i;
      // A size that the compiler knows is a move between registers.
      if (n == kTileRows)
        std::memcpy(to, from, sizeof(float[kTileRows]));
      else
        std::memcpy(to, from, n * sizeof(float));
    }
  }
}

// Where the thread copies pieces of both sides to.
static_assert(kHeight % kTileRows == 0 && kColumns % kPanel == 0);
struct Copies {
  float *a, *b;

  Copies() {
    thread_local Memory memory[2];
    a = memory[0].hold(kHeight * kDepth);
    b = memory[1].hold(kColumns * kDepth);
  }
};

// c[rows, columns] = or += a[rows, depth] b[depth, columns]
template <bool kATurned, bool kBTurned>
void product_by_vectors(int64_t rows, int64_t columns, int64_t depth, Side<kATurned> a,
                        Side<kBTurned> b, float* c, int64_t c_stride, bool add) {
  const Copies copies;
  const auto sizes = std::make_integer_sequence<int, kTileRows>();
  for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
    const int64_t wide = std::min(kColumns, columns - j0);
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t deep = std::min(kDepth, depth - k0);
      const bool more = add || k0 > 0;
      (kBTurned ? turn_panels : copy_panels)(b.at(k0, j0), b.stride, deep, wide, copies.b);
      for (int64_t i0 = 0; i0 < rows; i0 += kHeight) {
        const int64_t high = std::min(kHeight, rows - i0);
        if (kATurned) copy_groups(a.at(i0, k0), a.stride, deep, high, copies.a);
        for (int64_t j = 0; j < wide; j += kPanel)
          for (int64_t i = 0; i < high; i += kTileRows) {
            const int64_t n = std::min<int64_t>(kTileRows, high - i);
            const TileKernel tile = tile_of<kATurned>(n, sizes);
            const float* from = kATurned ? copies.a + i * deep : a.at(i0 + i, k0);
            const float* panel = copies.b + j * deep;
            float* to = c + (i0 + i) * c_stride + j0 + j;
            if (wide - j >= kPanel)
              tile(deep, from, a.stride, panel, to, c_stride, more);
            else
              narrow_tile(tile, n, wide - j, deep, from, a.stride, panel, to, c_stride, more);
          }
      }
    }
  }
}

}  // namespace dynmoe
