// Runs the fuzz target where there is no libFuzzer: mutate COUNT SEED FILE..., a fixed sequence of damaged files.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  const auto below = [&](uint64_t bound) { return bound == 0 ? 0 : random() % bound; };
  std::vector<std::vector<uint8_t>> seeds;
  for (int i = 3; i < argc; ++i) {
    std::ifstream stream(argv[i], std::ios::binary);
    if (!stream) return 2;
    seeds.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    LLVMFuzzerTestOneInput(seeds.back().data(), seeds.back().size());
  }
  const uint8_t kBytes[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '"', '{', '}', '[', ']', ',', ':', '\\', '-', '0', '9'};
  const long count = std::atol(argv[1]);
  for (long run = 0; run < count; ++run) {
    std::vector<uint8_t> file = seeds[below(seeds.size())];
    for (uint64_t edits = 1 + below(4); edits > 0; --edits) {
      // Headers come first: half of all damage is done to the first bytes.
      const uint64_t at = below(random() % 2 == 0 ? std::min<uint64_t>(file.size(), 64) : file.size());
      const auto place = file.begin() + at;
      switch (file.empty() ? 2 : below(6)) {
        case 0:
          *place = static_cast<uint8_t>(random());
          break;
        case 1:
          *place = kBytes[below(std::size(kBytes))];
          break;
        case 2:
          file.insert(place, kBytes[below(std::size(kBytes))]);
          break;
        case 3:
          file.erase(place, place + below(std::min<uint64_t>(file.size() - at, 16) + 1));
          break;
        case 4: {  // a count or an offset, of any size
          const uint64_t value = random() >> below(64);
          for (uint64_t i = 0; i < 8 && at + i < file.size(); ++i) file[at + i] = static_cast<uint8_t>(value >> 8 * i);
          break;
        }
        default: {  // a part of a file, again
          const auto& other = seeds[below(seeds.size())];
          const uint64_t from = below(other.size()), length = below(std::min<uint64_t>(other.size() - from, 64) + 1);
          file.insert(place, other.begin() + from, other.begin() + from + length);
        }
      }
    }
    if (below(8) == 0) file.resize(below(file.size() + 1));
    LLVMFuzzerTestOneInput(file.data(), file.size());
  }
  std::printf("%ld\n", count);
}
