#include "pygen/gated_unit_rule.h"
#include "strips.h"

namespace pygen::PYGEN_ISA {
namespace {

enum : int { kGate, kUp, kGrad, kOut, kGradGate, kGradUp, kOperands };

// Operands that are not there take no part.
struct Chunks {
  ChunkView view[kOperands];
  bool present[kOperands];

  template <DType kDType>
  PYGEN_INLINE Strip load(int operand, int64_t i) const {
    return load_strip<kDType>(view[operand].data + i * size_of(kDType));
  }
  template <DType kDType>
  PYGEN_INLINE void store(int operand, int64_t i, const Strip& strip) const {
    if (present[operand]) store_strip<kDType>(view[operand].data + i * size_of(kDType), strip);
  }

  template <DType kDType, Activation kActivation, bool kGradients>
  void run(int64_t count) const {
    for (int64_t i = 0; i < count; i += kStrip) {
      const Strip gate = load<kDType>(kGate, i), up = load<kDType>(kUp, i);
      if constexpr (kGradients) {
        const Strip grad = load<kDType>(kGrad, i);
        Strip value, slope;
        activate<kActivation>(gate, value, slope);
        store<kDType>(kOut, i, value * up);
        store<kDType>(kGradGate, i, grad * up * slope);
        store<kDType>(kGradUp, i, grad * value);
      } else {
        store<kDType>(kOut, i, activate<kActivation>(gate) * up);
      }
    }
  }
};

using Run = void (Chunks::*)(int64_t) const;

template <DType kDType, Activation kActivation>
Run choose(bool gradients) {
  return gradients ? &Chunks::run<kDType, kActivation, true> : &Chunks::run<kDType, kActivation, false>;
}
template <DType kDType>
Run choose(Activation activation, bool gradients) {
  switch (activation) {
    case Activation::kSilu:
      return choose<kDType, Activation::kSilu>(gradients);
    case Activation::kGelu:
      return choose<kDType, Activation::kGelu>(gradients);
    case Activation::kGeluTanh:
      return choose<kDType, Activation::kGeluTanh>(gradients);
  }
  __builtin_unreachable();
}
Run choose(DType dtype, Activation activation, bool gradients) {
  if (dtype == DType::kFloat32) return choose<DType::kFloat32>(activation, gradients);
  if (dtype == DType::kBFloat16) return choose<DType::kBFloat16>(activation, gradients);
  return choose<DType::kFloat16>(activation, gradients);
}

}  // namespace

void gated_unit(const GatedUnitArgs& args, int64_t begin, int64_t end) {
  const Operand* const operands[kOperands] = {&args.gate, &args.up,        &args.grad,
                                              &args.out,  &args.grad_gate, &args.grad_up};
  const int inner = args.ndim - 1;
  char buffers[kOperands][kChunk * sizeof(float)];
  Chunks chunks;
  bool in_place = args.size[inner] >= kChunk;  // nothing goes through a buffer, but for the last partial strip of a run
  for (int o = 0; o < kOperands; ++o) {
    chunks.present[o] = operands[o]->data != nullptr;
    in_place &= !chunks.present[o] || operands[o]->stride[inner] == 1;
  }
  const Run run = choose(args.gate.dtype, args.activation, chunks.present[kGradGate] || chunks.present[kGradUp]);
  for (Cursor at(args.size, args.ndim, begin); at.position < end;) {
    int64_t count = std::min(end - at.position, in_place ? at.run() : kChunk);
    if (count > kStrip) count -= count % kStrip;
    for (int o = 0; o < kOperands; ++o) {
      if (!chunks.present[o]) continue;
      chunks.view[o].open(*operands[o], at, count, buffers[o]);
      if (o < kOut) chunks.view[o].gather(at, count);
    }
    (chunks.*run)(count);
    for (int o = kOut; o < kOperands; ++o) {
      if (chunks.present[o]) chunks.view[o].scatter(at, count);
    }
    at.advance(count);
  }
}

}  // namespace pygen::PYGEN_ISA
