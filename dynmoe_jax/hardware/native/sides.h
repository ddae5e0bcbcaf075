// The two sides of a matrix product, each of which may be stored turned.

#pragma once

#include <cstdint>

namespace dynmoe {

constexpr int64_t kColumns = 256;  // of B that are worked on at a time by vectors

// Columns of a task: many, because each task copies the other side by itself.
constexpr int64_t kColumnsOfTask = 512;

constexpr int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// One side of a product: element (i, j) is data[i * stride + j], turned data[j * stride + i].
template <bool kTurned>
struct Side {
  const float* data;
  int64_t stride;

  const float* at(int64_t i, int64_t j) const {
    return data + (kTurned ? j * stride + i : i * stride + j);
  }
};

using Plain = Side<false>;
using Turned = Side<true>;

}  // namespace dynmoe
