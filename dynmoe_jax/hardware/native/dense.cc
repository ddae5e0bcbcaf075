// Products of whole matrices in float32, for CPUs on which `product.h` is faster than XLA.

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace dynmoe {
namespace {

namespace ffi = xla::ffi;

// Rows of a task: many, so that a copy of the other side serves many, but tasks for all threads.
int64_t rows_of_task(int64_t rows, int64_t columns, int64_t threads) {
  constexpr int64_t kMost = 512, kLeast = 128;
  int64_t size = kMost;
  while (size > kLeast && rows / size * blocks(columns, kColumnsOfTask) < kTasksOfThread * threads)
    size /= 2;
  return size;
}

template <bool kATurned, bool kBTurned>
void multiply_all(ffi::ThreadPool& pool, int64_t rows, int64_t columns, int64_t depth,
                  Side<kATurned> a, Side<kBTurned> b, float* c) {
  const int64_t height = rows_of_task(rows, columns, pool.num_threads());
  // The last one has what is left over: a few rows by themselves would be added up in another way.
  const int64_t parts = std::max<int64_t>(1, rows / height);
  for_each_task(pool, parts * blocks(columns, kColumnsOfTask), [&](int64_t i) {
    const int64_t row = i % parts * height, column = i / parts * kColumnsOfTask;
    const bool last = i % parts == parts - 1;
    product(last ? rows - row : height, std::min(kColumnsOfTask, columns - column), depth,
            Side<kATurned>{a.at(row, 0), a.stride}, Side<kBTurned>{b.at(0, column), b.stride},
            c + row * columns + column, columns, false);
  });
}

using Matrix = ffi::BufferR2<ffi::F32>;

ffi::Error multiply_handler(ffi::ThreadPool pool, Matrix a, Matrix b, ffi::Result<Matrix> c,
                            bool a_turned, bool b_turned) {
  const int64_t rows = c->dimensions()[0], columns = c->dimensions()[1];
  const int64_t a_stride = a.dimensions()[1], b_stride = b.dimensions()[1];
  const int64_t depth = a.dimensions()[a_turned ? 0 : 1];
  const float *left = a.typed_data(), *right = b.typed_data();
  float* to = c->typed_data();
  const auto by = [&](auto a_side, auto b_side) {
    multiply_all(pool, rows, columns, depth, a_side, b_side, to);
  };
  if (a_turned && b_turned)
    by(Turned{left, a_stride}, Turned{right, b_stride});
  else if (a_turned)
    by(Turned{left, a_stride}, Plain{right, b_stride});
  else if (b_turned)
    by(Plain{left, a_stride}, Turned{right, b_stride});
  else
    by(Plain{left, a_stride}, Plain{right, b_stride});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynmoe_product, multiply_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()  // a
                                  .Arg<Matrix>()  // b
                                  .Ret<Matrix>()  // c = a b
                                  .Attr<bool>("a_turned")
                                  .Attr<bool>("b_turned"));

// Whether products are by AMX.
extern "C" bool dynmoe_has_matrix_unit() {
#if DYNMOE_AMX
  return may_use_amx();
#else
  return false;
#endif
}

}  // namespace dynmoe
