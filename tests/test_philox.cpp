// kernels/philox.h against known answers, and the properties its users rely on.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "kernels/philox.h"
#include "tests/reference/random.h"

using namespace ddpm;

namespace {

std::vector<uint32_t> read_hex(std::istream& in, int count) {
  std::vector<uint32_t> values(static_cast<size_t>(count));
  for (uint32_t& v : values) in >> std::hex >> v >> std::dec;
  return values;
}

RandomStream read_address(std::istream& in, Purpose purpose) {
  RandomStream s{.seed = 0, .purpose = purpose};
  in >> s.seed >> s.sample >> s.layer >> s.step;
  return s;
}

Purpose read_purpose(std::istream& in) {
  int number = -1;
  in >> number;
  return static_cast<Purpose>(number);
}

std::vector<uint32_t> vector_of(const Philox4& words) { return {words.begin(), words.end()}; }

void check_line(std::istream& in, const std::string& kind) {
  uint32_t block = 0, expected = 0;
  if (kind == "philox") {
    const auto c = read_hex(in, 4), k = read_hex(in, 2);
    CHECK(vector_of(philox4x32({c[0], c[1], c[2], c[3]}, k[0], k[1])) == read_hex(in, 4));
  } else if (kind == "block") {
    const RandomStream s = read_address(in, read_purpose(in));
    in >> block;
    CHECK(vector_of(s.block(block)) == read_hex(in, 4));
  } else if (kind == "normal") {
    const RandomStream s = read_address(in, read_purpose(in));
    in >> block;
    for (double z : ref::normals(s, 4, block)) {
      double value = NAN;
      in >> value;
      CHECK(std::abs(z - value) < 1e-9);
    }
  } else if (kind == "dropout") {
    const RandomStream s = read_address(in, Purpose::kDropout);
    in >> block;
    const Philox4 words = s.block(block);
    const auto bits = read_hex(in, 8);
    for (int i = 0; i < 8; ++i) CHECK(dropout_bits(words, i) == bits[static_cast<size_t>(i)]);
  } else if (kind == "timestep") {
    const RandomStream s = read_address(in, Purpose::kTimestep);
    uint32_t timesteps = 0;
    in >> timesteps >> expected;
    CHECK(uniform_below(s.block(0)[0], timesteps) == expected);
  } else if (kind == "flip") {
    const RandomStream s = read_address(in, Purpose::kFlip);
    in >> expected;
    CHECK((s.block(0)[0] & 1) == expected);
  } else if (kind == "permute") {
    uint64_t count = 0, seed = 0, index = 0, place = 0;
    uint32_t epoch = 0;
    in >> count >> seed >> epoch >> index >> place;
    CHECK(permute(index, count, seed, epoch) == place);
  } else {
    FAIL("unknown kind");
  }
  CHECK(in);
}

std::vector<uint64_t> permutation(uint64_t count, uint64_t seed, uint32_t epoch) {
  std::vector<uint64_t> places(count);
  for (uint64_t i = 0; i < count; ++i) places[i] = permute(i, count, seed, epoch);
  return places;
}

// Pearson's statistic against equal frequencies.
double chi_square(const std::vector<int>& counts) {
  const double mean =
      std::accumulate(counts.begin(), counts.end(), 0.0) / static_cast<double>(counts.size());
  double sum = 0;
  for (int c : counts) sum += (c - mean) * (c - mean) / mean;
  return sum;
}

}  // namespace

TEST_CASE("philox: known answers", "[philox]") {
  const auto path =
      std::filesystem::path(__FILE__).parent_path() / "golden" / "philox_known_answers.txt";
  std::ifstream file(path);
  REQUIRE(file);
  std::string line;
  int lines = 0;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') continue;
    CAPTURE(line);
    std::istringstream in(line);
    std::string kind;
    in >> kind;
    check_line(in, kind);
    ++lines;
  }
  CHECK(lines == 311);
}

TEST_CASE("philox: the counter's layout", "[philox]") {
  const RandomStream s{.seed = 0x1111111122222222,
                       .purpose = Purpose::kSampleNoise,
                       .sample = 0xAB12345678,
                       .step = 0xCAFE0001,
                       .layer = 0xBEEF};
  CHECK(s.counter(0x99) == Philox4{0x99, 0x12345678, 0xAB07BEEF, 0xCAFE0001});
  CHECK(s.block(0x99) == philox4x32(s.counter(0x99), 0x22222222, 0x11111111));
  static_assert(RandomStream{}.block(0)[0] == 0x6627e8d5u);
}

TEST_CASE("philox: permute is a bijection", "[philox]") {
  for (uint64_t count : {1, 2, 3, 4, 5, 6, 7, 15, 16, 17, 63, 64, 65, 100, 1000, 4096, 4097, 50000})
    for (uint64_t seed : {uint64_t{0}, uint64_t{0x8000000000000001}})
      for (uint32_t epoch : {0u, 1u, 4000000000u}) {
        if (count == 50000 && epoch == 1) continue;
        CAPTURE(count, seed, epoch);
        auto places = permutation(count, seed, epoch);
        std::sort(places.begin(), places.end());
        bool complete = true;
        for (uint64_t i = 0; i < count; ++i) complete &= places[i] == i;
        CHECK(complete);
      }
}

TEST_CASE("philox: permute differs by epoch and seed", "[philox]") {
  const auto base = permutation(1000, 5, 0);
  std::vector<uint64_t> identity(1000);
  std::iota(identity.begin(), identity.end(), 0);
  for (const auto& other :
       {identity, permutation(1000, 5, 1), permutation(1000, 6, 0), permutation(1000, 5, 1u << 31),
        permutation(1000, 5 | uint64_t{1} << 63, 0)}) {
    int equal = 0;
    for (size_t i = 0; i < base.size(); ++i) equal += base[i] == other[i];
    CHECK(equal < 10);  // two random permutations agree in one place on average
  }
}

// Places of the first two of five images: 20 equally likely pairs; 19 degrees of freedom exceed 50
// once in 7000 times.
TEST_CASE("philox: permute favours no order", "[philox]") {
  std::vector<int> pairs(25);
  for (uint32_t epoch = 0; epoch < 20000; ++epoch)
    ++pairs[permute(0, 5, 11, epoch) * 5 + permute(1, 5, 11, epoch)];
  std::vector<int> possible;
  for (size_t i = 0; i < 25; ++i)
    if (i / 5 == i % 5)
      CHECK(pairs[i] == 0);
    else
      possible.push_back(pairs[i]);
  CHECK(chi_square(possible) < 50);

  std::vector<int> orders(9);  // of three images: all six occur
  for (uint32_t epoch = 0; epoch < 600; ++epoch)
    ++orders[permute(0, 3, 2, epoch) * 3 + permute(1, 3, 2, epoch)];
  CHECK(std::count(orders.begin(), orders.end(), 0) == 3);
}

TEST_CASE("philox: uniform numbers", "[philox]") {
  CHECK(uniform_open(0) == 0x1p-33f);
  CHECK(uniform_open(0xFFFFFFFFu) == 1.0f);
  CHECK(uniform_open(0x80000000u) == 0.5f);
  CHECK(uniform_below(0xFFFFFFFFu, 1000) == 999);
  CHECK(uniform_below(0, 1000) == 0);

  constexpr int kDraws = 100000;
  std::vector<int> bins(100), low_bits(256);
  double sum = 0;
  const RandomStream stream{.seed = 3, .purpose = Purpose::kTimestep};
  for (uint32_t block = 0; block < kDraws / 4; ++block)
    for (uint32_t word : stream.block(block)) {
      ++bins[uniform_below(word, 100)];
      ++low_bits[word & 255];
      sum += double{uniform_open(word)};
    }
  CHECK(std::abs(sum / kDraws - 0.5) < 4 * std::sqrt(1 / 12.0 / kDraws));
  CHECK(chi_square(bins) < 99 + 5 * std::sqrt(2.0 * 99));
  CHECK(chi_square(low_bits) < 255 + 5 * std::sqrt(2.0 * 255));
}
