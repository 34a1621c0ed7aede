#include "packed_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace pathnet::cpu {
namespace {

constexpr uint64_t kMagic = 0x314e414c50485450;  // "PTHPLAN1"
constexpr int64_t kCacheLine = 64;

struct Header {
  uint64_t magic;
  int32_t isa;
  WalkKind kind;
  int32_t bf16;  // 1 or 0
  int32_t block_count, unit_count, addend_count;
  int64_t scale_count;
  int64_t weights_bytes;
  uint64_t weights_checksum;
  uint64_t checksum;  // of all bytes before the weights, with 0 in its own place

  int64_t units_byte() const { return int64_t(sizeof(Header)) + block_count * int64_t(sizeof(Block)); }
  int64_t scales_byte() const { return units_byte() + unit_count * int64_t(sizeof(Unit)); }
  int64_t shifts_byte() const { return scales_byte() + scale_count * int64_t(sizeof(float)); }
  int64_t addends_byte() const { return shifts_byte() + scale_count * int64_t(sizeof(float)); }
  // Backward, the factors are part of the weights or of a record.
  int64_t tables_end() const {
    return is_forward(kind) ? addends_byte() + addend_count * int64_t(sizeof(float)) : scales_byte();
  }
  int64_t weights_byte() const { return (tables_end() + kCacheLine - 1) / kCacheLine * kCacheLine; }
  int64_t seal_byte() const { return weights_byte() + weights_bytes; }
  int64_t size() const { return seal_byte() + int64_t(sizeof(checksum)); }
};
static_assert(sizeof(Header) == kCacheLine, "the tables after it are aligned as the tensor is");

// Four sums side by side, since each waits for its own multiplications. The rotation lets high bits, such as the
// signs of floats, reach low ones.
uint64_t checksum_of(const uint8_t* bytes, int64_t size, uint64_t seed) {
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  const auto add = [](uint64_t& sum, uint64_t word) {
    sum = (sum ^ word) * kFactor;
    sum = sum << 29 | sum >> 35;
  };
  uint64_t sums[4] = {seed, seed + 1, seed + 2, seed + 3};
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes + i, sizeof(words));
    for (int j = 0; j < 4; ++j) add(sums[j], words[j]);
  }
  uint64_t total = uint64_t(size);
  for (uint64_t sum : sums) add(total, sum);
  for (; i < size; ++i) add(total, bytes[i]);
  return total;
}

// Returns the checksum of all bytes before the weights.
uint64_t header_checksum(Header header, const uint8_t* bytes) {
  header.checksum = 0;
  const uint64_t sum = checksum_of(reinterpret_cast<const uint8_t*>(&header), sizeof(header), 0);
  return checksum_of(bytes + sizeof(header), header.weights_byte() - int64_t(sizeof(header)), sum);
}

[[noreturn]] void refuse(const std::string& expected, const std::string& actual) {
  throw std::runtime_error("plan: expected " + expected + ", got " + actual);
}

const char* kind_name(WalkKind kind) {
  constexpr const char* names[kWalkKinds] = {"backward_running", "backward_batch", "forward_running",
                                             "forward_batch"};
  return names[int(kind)];
}

Header make_header(const PlanParts& parts) {
  const Isa isa = selected_isa();
  return {kMagic,
          int32_t(isa),
          parts.kind,
          parts.bf16,
          int32_t(parts.plan.block_count),
          int32_t(parts.plan.unit_count),
          int32_t(parts.addends.count),
          parts.scale_count,
          kernels_of(isa, parts.bf16).packed_size(parts.plan, direction_of(parts.kind)),
          0,
          0};
}

template <class Value>
void write(uint8_t* bytes, int64_t byte, const Value* values, int64_t count) {
  if (count > 0) std::memcpy(bytes + byte, values, count * sizeof(Value));
}

// The header, once the whole plan is known to be as it was packed.
Header checked_header(const uint8_t* bytes, int64_t size) {
  Header header;
  if (size < int64_t(sizeof(header))) refuse("what cpu_pack made", std::to_string(size) + " bytes");
  std::memcpy(&header, bytes, sizeof(header));
  // Within these bounds no offset leaves int64.
  const bool plausible = header.magic == kMagic && int(header.kind) >= 0 && int(header.kind) < kWalkKinds &&
                         header.isa >= 0 && header.isa <= int32_t(Isa::kAmx) && header.block_count >= 1 &&
                         header.unit_count >= 1 && header.addend_count >= 0 && header.scale_count >= 0 &&
                         header.scale_count <= INT32_MAX && header.weights_bytes >= 0 &&
                         header.weights_bytes <= INT64_MAX / 2;
  if (!plausible) refuse("what cpu_pack made", "other bytes");
  if (size != header.size()) refuse(std::to_string(header.size()) + " bytes", std::to_string(size) + " bytes");
  if (header.checksum != header_checksum(header, bytes)) {
    refuse("what cpu_pack made", "tables that changed since");
  }
  if (std::memcmp(&header.checksum, bytes + header.seal_byte(), sizeof(header.checksum)) != 0) {
    refuse("what cpu_pack made", "the weights of another plan");
  }
  return header;
}

}  // namespace

void pack_plan(const PlanParts& parts, const std::function<uint8_t*(int64_t)>& allocate,
               const std::function<void()>& check) {
  Header header = make_header(parts);
  uint8_t* bytes = allocate(header.size());
  write(bytes, sizeof(header), parts.plan.blocks, header.block_count);
  write(bytes, header.units_byte(), parts.plan.units, header.unit_count);
  if (is_forward(parts.kind)) {
    write(bytes, header.scales_byte(), parts.plan.scales, header.scale_count);
    write(bytes, header.shifts_byte(), parts.shifts, header.scale_count);
    write(bytes, header.addends_byte(), parts.addends.values, header.addend_count);
  }
  uint8_t* weights = bytes + header.weights_byte();
  const bool fold_scales = parts.kind == WalkKind::kBackwardRunning;
  kernels_of(Isa(header.isa), parts.bf16).pack(parts.plan, direction_of(parts.kind), fold_scales, weights, check);
  header.weights_checksum = checksum_of(weights, header.weights_bytes, 0);
  header.checksum = header_checksum(header, bytes);
  write(bytes, 0, &header, 1);
  write(bytes, header.seal_byte(), &header.checksum, 1);
}

UnpackedPlan unpack_plan(const uint8_t* bytes, int64_t size, WalkKind kind) {
  const Header header = checked_header(bytes, size);
  if (header.kind != kind) {
    refuse(std::string("a plan for the pass ") + kind_name(kind), std::string("one for ") + kind_name(header.kind));
  }
  const Isa isa = selected_isa();
  if (header.isa != int32_t(isa)) {
    refuse(std::string("a plan for the instruction set ") + isa_name(isa),
           std::string("one for ") + isa_name(Isa(header.isa)));
  }
  UnpackedPlan unpacked = {std::vector<Block>(header.block_count),
                           std::vector<Unit>(header.unit_count),
                           {},
                           kernels_of(isa, header.bf16 != 0),
                           bytes + header.weights_byte(),
                           header.scale_count,
                           nullptr,
                           nullptr};
  std::memcpy(unpacked.blocks.data(), bytes + sizeof(header), header.block_count * sizeof(Block));
  std::memcpy(unpacked.units.data(), bytes + header.units_byte(), header.unit_count * sizeof(Unit));
  unpacked.plan.blocks = unpacked.blocks.data();
  unpacked.plan.block_count = header.block_count;
  unpacked.plan.units = unpacked.units.data();
  unpacked.plan.unit_count = header.unit_count;
  if (is_forward(kind)) {
    unpacked.plan.scales = reinterpret_cast<const float*>(bytes + header.scales_byte());
    unpacked.shifts = reinterpret_cast<const float*>(bytes + header.shifts_byte());
    if (header.addend_count > 0) unpacked.addends = reinterpret_cast<const float*>(bytes + header.addends_byte());
  }
  return unpacked;
}

}  // namespace pathnet::cpu
