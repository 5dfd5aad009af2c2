// The phases that layers are made of. Every function adds phases to a region; what it is given must live until the region
// has run.
#pragma once

#include <cstdint>

#include "operand.h"
#include "panels.h"
#include "region.h"

namespace wicore {


// The operand from x [rows, K].
void add_fill(Region& region, const Operand& operand, const float* x);

// out [rows, N] = x · W + bias; bias is [N] or null.
void add_product(Region& region, const PackedMatrix& matrix, const Operand& x, const float* bias, float* out);

// W, packed in pairs, holds the gate's columns, then as many of the other branch: hidden [rows, N / 2] = gelu(x · gate) * (x · up). N / 2
// must be a multiple of the panel and of the hidden operand's block.
void add_gated_product(Region& region, const PackedMatrix& matrix, const Operand& x, const Operand& hidden);

// Whether a matrix and the one behind it can go through `add_gated_product`.
bool can_gate(const Shape& gate_up, const Shape& down);

// What lies between two products: stream += rms_norm(addend) * addend_gamma where there is an addend, and next =
// rms_norm(stream) * next_gamma where there is a next operand. Norms are of the root mean square (arXiv 1910.07467).
struct Residual {
  const float* stream;        // [rows, D]
  const float* addend;        // [rows, D] or null
  const float* addend_gamma;  // [D]
  float* out;                 // [rows, D]: the new stream; may be `stream`, and is null where there is no addend
  const float* next_gamma;    // [D] or null
  const Operand* next;        // or null
  int64_t width;              // D
  float epsilon;
};

void add_residual(Region& region, const Residual& residual, int64_t rows);

}  // namespace wicore
