// What slot attention computes beside its pass over the tokens: products of the slots with weights, and the backward of
// the tokens' LayerNorm. Everything is f32, or everything is f64.
#pragma once

#include "vidops/tensor_view.h"

namespace vidops {

// out (B,M,N) = a (B,M,K) b (B,K,N) + bias (N), or added to what out holds.
struct ProductParams {
  TensorView a, b;             // any strides; the last axis contiguous
  bool a_turned = false;       // a is (B,K,M)
  bool b_turned = false;       // b is (B,N,K)
  TensorView packed;           // b as `product_pack_cpu` lays it out; absent: done here, for this product alone
  TensorView bias;             // contiguous; absent: zero
  TensorView out;              // the last axis contiguous; overlaps nothing else
  bool add = false;
};

// grad (B,N,D): from the gradient of (rows - mean) * rstd to that of the rows, in place.
struct TokenNormGradParams {
  TensorView rows, mean, rstd;  // (B,N,D), (B,N) contiguous
  TensorView grad;
};

// A right operand laid out once for several products: (B, product_packed_size) elements, contiguous.
int64_t product_packed_size(DType dtype, int64_t n, int64_t k);
void product_pack_cpu(const TensorView& b, bool b_turned, const TensorView& packed, int threads);

// The result does not depend on the number of threads.
void product_cpu(const ProductParams& params, int threads);
void token_norm_grad_cpu(const TokenNormGradParams& params, int threads);

}  // namespace vidops
