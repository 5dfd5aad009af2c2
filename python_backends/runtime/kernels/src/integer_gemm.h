// Products of int8 activations with a packed matrix, for decode steps: few rows, every weight read once.
//
// A row's result is the same, bit for bit, however many rows share the call and whichever kernel of a processor computes
// it: dot products within a block are exact integers, and blocks are added in order with the same float32 operations.
#pragma once

#include <cstdint>

#include "activations.h"
#include "panels.h"

namespace wicore {

// out [rows, 32] float32, contiguous: the products of all rows with one panel, by vector instructions; any number of rows.
// avx512/ multiplies with VPDPBUSD, avx2/ with VPMADDUBSW.
void multiply_panel_vector(const PackedMatrix& matrix, int64_t panel, const QuantizedRows& x, int64_t rows, float* out);

// The same with AMX tiles. The calling thread must hold `AmxTiles(tile_k_bytes(matrix.shape()))`, and x must have been
// made for a multiple of 16 rows, of which those from `rows` on may hold anything.
inline int tile_k_bytes(const Shape& shape) { return shape.block == 32 ? 32 : 64; }
void multiply_panel_amx(const PackedMatrix& matrix, int64_t panel, const QuantizedRows& x, int64_t rows, float* out);

// Rows from which on AMX is the faster one.
constexpr int64_t kAmxFromRows = 9;

}  // namespace wicore
