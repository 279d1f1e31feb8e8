// What the ranks of a run say to each other. A rank is a process; a run by itself is rank
// 0 of 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace ddpm {

// Seconds spent on sums over ranks.
struct CommSeconds {
  double summing = 0;  // from the start of each sum to its end, slower ranks included
  double waiting = 0;  // of these, while nothing was computed
};

// Where a method says so, all ranks call it, in the same order.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string description() const = 0;  // of what carries the messages

  // ---- on the host's memory; they wait for the other ranks ----
  // All ranks: `bytes` of rank 0 into everybody's `data`.
  virtual void broadcast(void* data, size_t bytes) = 0;
  // All ranks: `all` holds size() parts of `bytes_each`; each rank's own part goes to everybody.
  virtual void share(void* all, size_t bytes_each) = 0;

  // ---- on the backend's memory, within a step: in order with its calls, and recorded with them
  // All ranks: data[0, count), of fp32 or bf16, becomes the sum over ranks, in an order that is
  // fixed for a number of ranks; equal bits on all of them. Of bf16 each addition is rounded. Until
  // finish_sums() the data belongs to the sum.
  virtual void start_sum(void* data, DType type, int64_t count) = 0;
  virtual void finish_sums() = 0;
  // All ranks: of data[0, count), cut into slices of slice_of(count), everybody's slice number
  // rank() comes into parts[r] for each rank r.
  virtual void exchange_slices(const float* data, int64_t count, float* const* parts) = 0;
  // All ranks: and back: each rank's `slice` goes to its place in everybody's data.
  virtual void gather_slices(const float* slice, float* data, int64_t count) = 0;
  // All ranks: as share().
  virtual void share_in_step(void* all, size_t bytes_each) = 0;
  // The host has asked for a step. What a device has ended by then is known by these.
  virtual void step_asked() {}

  int64_t slice_of(int64_t count) const { return (count + size() - 1) / size(); }
  // Nothing where a device's streams hide it.
  virtual std::optional<CommSeconds> seconds() const = 0;
  // Before this rank leaves alone, by an error that the others do not know of: they leave too, with
  // Status::kPeer, and say why. Nothing else may be called after it.
  virtual void announce_failure(const std::string& what) = 0;
};

// Rank 0 of 1.
std::unique_ptr<Communicator> make_solo_communicator();

struct CommOptions {
  double timeout = 60;  // seconds without a sign of life after which a rank is lost
  // Called, in a thread of the communicator, when another rank is lost: says why, unless the text
  // is empty because another rank says it; and ends the process with Status::kPeer.
  std::function<void(const std::string&)> say;
  std::function<void()> leave;
  std::string advice;  // said behind it where a rank is lost: what to do
};
// Whether a launcher of MPI has started this process.
bool started_by_mpi();
// Joins the ranks that it started. Error(kUsage) where the build has no MPI.
std::unique_ptr<Communicator> make_mpi_communicator(const CommOptions&);
// "Open MPI 4.1.4", or empty.
std::string mpi_library();

// Ranks over TCP, which meet at "host:port" of rank 0's machine; on the host's memory only. A rank
// is lost when nothing has come from it for the timeout, or when its connection ends. Error(kUsage)
// where rank 0 cannot listen there.
std::unique_ptr<Communicator> make_tcp_communicator(const std::string& place, int rank, int size,
                                                    const CommOptions&);
// Of this machine.
std::string host_name();

// Ranks on GPUs, one each. What is said on the host goes by `control`, which also watches the
// ranks; here one is lost when NCCL says so, or when a step has not ended for the timeout. The
// backend and `control` must outlive it, recordings must not. Error(kUsage) where the build has no
// NCCL.
std::unique_ptr<Communicator> make_nccl_communicator(Backend& backend, Communicator& control,
                                                     const CommOptions&);
// "NCCL 2.28.9", or empty.
std::string nccl_library();

// An error that all ranks have come to: nobody need be told, and rank 0 says it.
class AgreedError : public Error {
 public:
  using Error::Error;
};

// All ranks: what each of them gives, by rank.
std::vector<std::string> gather(Communicator&, const std::string& own);
// All ranks: whether it is so on any.
bool any(Communicator&, bool here);
// All ranks: runs `stage`, in which ranks do not talk. If it throws on some, AgreedError on all,
// with the first one's status and text.
void agree(Communicator&, const std::function<void()>& stage);
// All ranks: the values of each, rank by rank, on rank 0; nothing on the others.
std::vector<float> collect(Communicator&, const std::vector<float>& own);

// Items that ranks share out batch by batch: in a round each takes one, in the order of ranks.
struct Round {
  int64_t first = 0;  // of this rank's batch
  int count = 0;      // 0: there are none left for it
  int64_t next = 0;   // where the next round begins
};
// The round of items at, at + 1, ..., of which end - 1 is the last.
Round round_at(const Communicator&, int64_t at, int64_t end, int batch_size);

}  // namespace ddpm
