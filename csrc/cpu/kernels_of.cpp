#include "kernels.h"
#include "layout.h"

namespace pathnet {

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
  int64_t size = 0;
  const Network network = make_network(plan, false, false);
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    if (plan.units[u].scale_offset >= 0) size += batch * network.inputs[u].dense();
  }
  return size;
}

}  // namespace pathnet
