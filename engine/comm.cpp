#include "engine/comm.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

namespace ddpm {
namespace {

class SoloCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string description() const override { return "one process"; }
  void broadcast(void*, size_t) override {}
  void share(void*, size_t) override {}
  void start_sum(void*, DType, int64_t) override {}
  void finish_sums() override {}
  void exchange_slices(const float*, int64_t, float* const*) override {}
  void gather_slices(const float*, float*, int64_t) override {}
  void share_in_step(void*, size_t) override {}
  std::optional<CommSeconds> seconds() const override { return std::nullopt; }
  void announce_failure(const std::string&) override {}
};

struct Outcome {
  Status status = Status::kOk;
  std::string text;
};

Outcome outcome_of(const std::function<void()>& stage) {
  try {
    stage();
    return {};
  } catch (const Error& e) {
    return {e.status(), e.what()};
  } catch (const std::bad_alloc&) {
    return {Status::kMemory, "out of memory; use a smaller --batch-size"};
  }
}

}  // namespace

std::unique_ptr<Communicator> make_solo_communicator() {
  return std::make_unique<SoloCommunicator>();
}

std::vector<std::string> gather(Communicator& ranks, const std::string& own) {
  const auto size = static_cast<size_t>(ranks.size()), rank = static_cast<size_t>(ranks.rank());
  std::vector<uint64_t> lengths(size);
  lengths[rank] = own.size();
  ranks.share(lengths.data(), sizeof(uint64_t));
  const size_t longest = *std::max_element(lengths.begin(), lengths.end());
  std::vector<char> all(size * longest);
  if (longest > 0) {
    std::copy(own.begin(), own.end(), all.begin() + static_cast<std::ptrdiff_t>(rank * longest));
    ranks.share(all.data(), longest);
  }
  std::vector<std::string> texts;
  for (size_t r = 0; r < size; ++r) texts.emplace_back(all.data() + r * longest, lengths[r]);
  return texts;
}

bool any(Communicator& ranks, bool here) {
  if (ranks.size() == 1) return here;
  std::vector<uint8_t> all(static_cast<size_t>(ranks.size()));
  all[static_cast<size_t>(ranks.rank())] = here ? 1 : 0;
  ranks.share(all.data(), 1);
  return std::find(all.begin(), all.end(), 1) != all.end();
}

void agree(Communicator& ranks, const std::function<void()>& stage) {
  if (ranks.size() == 1) return stage();
  const Outcome own = outcome_of(stage);
  std::vector<int32_t> all(static_cast<size_t>(ranks.size()));
  all[static_cast<size_t>(ranks.rank())] = static_cast<int32_t>(own.status);
  ranks.share(all.data(), sizeof(int32_t));
  const auto failed = std::find_if(all.begin(), all.end(), [](int32_t s) { return s != 0; });
  if (failed == all.end()) return;
  const std::vector<std::string> texts = gather(ranks, own.text);
  const auto first = failed - all.begin();
  const std::string& text = texts[static_cast<size_t>(first)];
  throw AgreedError(
      static_cast<Status>(*failed),
      first == 0 ? text : format("rank %d: %s", static_cast<int>(first), text.c_str()));
}

std::vector<float> collect(Communicator& ranks, const std::vector<float>& own) {
  if (ranks.size() == 1) return own;
  constexpr size_t kPiece = size_t{16} << 20;  // values of all ranks that are under way at a time
  const auto size = static_cast<size_t>(ranks.size()), rank = static_cast<size_t>(ranks.rank());
  std::vector<uint64_t> counts(size);
  counts[rank] = own.size();
  ranks.share(counts.data(), sizeof(uint64_t));
  const size_t most = *std::max_element(counts.begin(), counts.end());
  const size_t each = std::min(most, std::max<size_t>(kPiece / size, 1));
  std::vector<size_t> begin(size);  // of each rank's values among all
  std::exclusive_scan(counts.begin(), counts.end(), begin.begin(), size_t{0});
  std::vector<float> all(rank == 0 ? begin.back() + counts.back() : 0), piece(size * each);
  for (size_t at = 0; at < most; at += each) {
    const auto left = [&](size_t r) { return std::min(each, counts[r] - std::min(at, counts[r])); };
    std::copy_n(own.data() + std::min(at, own.size()), left(rank), piece.data() + rank * each);
    ranks.share(piece.data(), each * sizeof(float));
    for (size_t r = 0; rank == 0 && r < size; ++r)
      std::copy_n(piece.data() + r * each, left(r), all.data() + begin[r] + at);
  }
  return all;
}

Round round_at(const Communicator& ranks, int64_t at, int64_t end, int batch_size) {
  const int64_t batch = batch_size, first = at + ranks.rank() * batch;
  return {first, static_cast<int>(std::clamp<int64_t>(end - first, 0, batch)),
          std::min(end, at + ranks.size() * batch)};
}

}  // namespace ddpm
