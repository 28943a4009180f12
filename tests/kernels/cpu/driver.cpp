// A program of its own around the native kernel, for what a Python process cannot be: sanitized, or another
// processor's.
//
//     driver IN OUT
//
// IN: int64 numbers and arrays, each after its number of bytes, in the order in which main reads them.
#include <cstdio>
#include <cstdlib>
#include <thread>
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layer.cpp"

namespace {

std::FILE* in;

template <typename Value>
std::vector<Value> read() {
  int64_t bytes = 0;
  if (std::fread(&bytes, sizeof bytes, 1, in) != 1) std::abort();
  std::vector<Value> values(bytes / sizeof(Value));
  if (bytes && std::fread(values.data(), 1, bytes, in) != (size_t)bytes) std::abort();
  return values;
}

// GOMP_parallel, but that the driver brings its own threads.
void run(void (*work)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < count; ++i) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

struct Stem {
  std::vector<uint8_t> packed = read<uint8_t>();
  std::vector<uint16_t> scales = read<uint16_t>();
  std::vector<uint8_t> grids = read<uint8_t>();
  std::vector<int32_t> num_bits = read<int32_t>();
  std::vector<int64_t> offsets = read<int64_t>();
  std::vector<uint8_t> bias = read<uint8_t>();
  // bias_dtype, projections, N, K, group_size
  std::vector<int64_t> numbers = read<int64_t>();

  Experts experts(const Threads& threads) {
    const int64_t N = numbers[2], K = numbers[3], groups = K / numbers[4];
    int failed = 0;
    for (size_t i = 0; i < num_bits.size(); ++i) {
      failed |= alphaq_reorder(packed.data() + 4 * offsets[i], N, K, num_bits[i], 0, &threads);
    }
    failed |= alphaq_reorder_groups(grids.data(), num_bits.size() * N, groups, 1, &threads);
    if (failed) std::abort();
    const void* biases = bias.empty() ? nullptr : bias.data();
    return {packed.data(),
            scales.data(),
            grids.data(),
            num_bits.data(),
            offsets.data(),
            biases,
            (Dtype)numbers[0],
            numbers[1],
            N,
            K,
            numbers[4]};
  }
};

}  // namespace

int main(int, char** arguments) {
  in = std::fopen(arguments[1], "rb");
  // num_tokens, top_k, num_experts, weight_on_input, digits, activation, number of threads, dtype of x and out
  const std::vector<int64_t> numbers = read<int64_t>();
  const std::vector<float> gate = read<float>();
  const std::vector<uint8_t> x = read<uint8_t>();
  const std::vector<float> topk_weights = read<float>();
  const std::vector<int32_t> expert_ids = read<int32_t>();
  Stem w13, w2;
#if defined(__AMX_TILE__)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) std::abort();
#endif
  const Threads threads{run, (int32_t)numbers[6]};
  const Dtype dtype = (Dtype)numbers[7];
  std::vector<uint8_t> out(numbers[0] * w2.numbers[2] * (dtype == FLOAT32 ? 4 : 2));
  const Call call{x.data(),
                  topk_weights.data(),
                  expert_ids.data(),
                  out.data(),
                  dtype,
                  numbers[0],
                  numbers[1],
                  numbers[2],
                  numbers[3],
                  numbers[4],
                  {(int)numbers[5], gate[0], gate[1], gate[2]},
                  threads};
  const Experts w13_experts = w13.experts(threads), w2_experts = w2.experts(threads);
  const int result = alphaq_fused_moe(&w13_experts, &w2_experts, &call);
  std::FILE* to = std::fopen(arguments[2], "wb");
  if (!out.empty()) std::fwrite(out.data(), 1, out.size(), to);
  std::fclose(to);
  return result;
}
