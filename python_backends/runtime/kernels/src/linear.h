// A linear layer over a packed matrix: which kernel runs, and how its work is cut into tasks.
#pragma once

#include <cstdint>

#include "panels.h"
#include "region.h"

namespace wicore {

// Products of up to so many rows use int8 activations, and a row's result does not depend on the others. It covers a
// decode step of 16 sequences with 4 draft tokens each. More rows, a prompt's or an image's, are multiplied in
// bfloat16 where there is AMX.
constexpr int64_t kIntegerRows = 80;

// Rows of a prompt that are multiplied at once; memory for activations stays bounded by it.
constexpr int64_t kRowsAtOnce = 512;

// x [rows, K] float32 times the matrix plus bias ([N] or null) to out [rows, N] float32. `region` gets the phases, and
// the pointers must stay valid until it has run; `memory` holds `linear_bytes(matrix, rows)` bytes, 64-byte aligned.
void add_linear(Region& region, const PackedMatrix& matrix, const float* x, int64_t rows, const float* bias, float* out,
                int threads, uint8_t* memory);

int64_t linear_bytes(const PackedMatrix& matrix, int64_t rows);

}  // namespace wicore
