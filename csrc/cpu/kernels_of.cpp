#include "kernels.h"
#include "layout.h"

namespace pathnet::cpu {

Kernels kernels_of(Isa isa, bool bf16) {
#ifdef PATHNET_X86
  if (isa == Isa::kAmx) return amx::kernels(bf16);
  if (isa == Isa::kAvx512Bf16) return avx512bf16::kernels(bf16);
  if (isa == Isa::kAvx512) return avx512::kernels(bf16);
  if (isa == Isa::kAvx2) return avx2::kernels(bf16);
#endif
  (void)isa;
  return base::kernels(bf16);
}

int64_t normalized_size(const Plan& plan, int64_t batch) {
  return normalized_starts(make_network(plan, false, false), batch).back();
}

}  // namespace pathnet::cpu
