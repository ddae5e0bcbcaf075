// A matrix product on one thread, C = A B or C += A B, of whose sides each may be stored turned.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "amx_product.h"
#include "sides.h"
#include "vector_product.h"
#include "vectors.h"

namespace dynmoe {

constexpr int kFewRows = 8;
constexpr int kUnrolled = 4;  // rows of b at a time: as many streams from memory

// c[kRows, columns] = or += a[kRows, depth] b[depth, columns], where b is read once, as it lies.
// A few rows cost no more than that, and a copy of b would.
template <int kRows>
void few_rows(int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
              int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int64_t k0 = 0; k0 < depth; k0 += kUnrolled, add = true) {
    const float* row[kUnrolled];
    float number[kRows][kUnrolled];
    for (int u = 0; u < kUnrolled; u++) {
      const int64_t k = std::min(k0 + u, depth - 1);
      row[u] = b + k * b_stride;
      for (int r = 0; r < kRows; r++) number[r][u] = k0 + u < depth ? a[r * a_stride + k] : 0.0f;
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j;
      Vector sums[kRows];
      for (int r = 0; r < kRows; r++) sums[r] = add ? load(c + r * c_stride + j, n) : Vector{};
      for (int u = 0; u < kUnrolled; u++) {
        __builtin_prefetch(row[u] + j + kUnrolled * b_stride);
        const Vector numbers = load(row[u] + j, n);
        for (int r = 0; r < kRows; r++) sums[r] += filled(number[r][u]) * numbers;
      }
      for (int r = 0; r < kRows; r++) store(c + r * c_stride + j, sums[r], n);
    }
  }
}

using FewRows = void (*)(int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                         int64_t, bool);

template <int... i>
FewRows few_rows_of(int rows, std::integer_sequence<int, i...>) {
  static constexpr FewRows kernels[] = {few_rows<i + 1>...};
  return kernels[rows - 1];
}

// c[rows, columns] = or += a[rows, depth] b[depth, columns]
template <bool kATurned, bool kBTurned>
void product(int64_t rows, int64_t columns, int64_t depth, Side<kATurned> a, Side<kBTurned> b,
             float* c, int64_t c_stride, bool add) {
  if constexpr (!kATurned && !kBTurned)
    if (rows <= kFewRows)
      return few_rows_of(rows, std::make_integer_sequence<int, kFewRows>())(
          columns, depth, a.data, a.stride, b.data, b.stride, c, c_stride, add);
#if DYNMOE_AMX
  if (rows >= kRowsForAmx && may_use_amx())
    return product_by_amx(rows, columns, depth, a, b, c, c_stride, add);
#endif
  product_by_vectors(rows, columns, depth, a, b, c, c_stride, add);
}

}  // namespace dynmoe
