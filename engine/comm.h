// What the ranks of a training run say to each other. A rank is a process; a run by itself is rank
// 0 of 1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/error.h"

namespace ddpm {

// Seconds spent on sums over ranks.
struct CommSeconds {
  double summing = 0;  // from the start of each sum to its end, slower ranks included
  double waiting = 0;  // of these, while nothing was computed
};

// Where a method says so, all ranks call it, in the same order; it waits for them. Memory is the
// host's.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string description() const = 0;  // of what carries the messages

  // All ranks: `bytes` of rank 0 into everybody's `data`.
  virtual void broadcast(void* data, size_t bytes) = 0;
  // All ranks: `all` holds size() parts of `bytes_each`; each rank's own part goes to everybody.
  virtual void share(void* all, size_t bytes_each) = 0;
  // All ranks: data[0, count) becomes the sum over ranks, as a binary tree in the ranks' order:
  // (r0 + r1) + (r2 + r3). Equal bits on all ranks.
  virtual void sum_in_order(float* data, int64_t count) = 0;
  // All ranks: the same in an order that is fixed for a number of ranks. Returns at once; until
  // finish_sums() the data belongs to the sum.
  virtual void start_sum(float* data, int64_t count) = 0;
  virtual void finish_sums() = 0;

  virtual CommSeconds seconds() const = 0;
  // Before this rank leaves alone, by an error that the others do not know of: they leave too, with
  // Status::kPeer, and say why. Nothing else may be called after it.
  virtual void announce_failure(const std::string& what) = 0;
};

// Rank 0 of 1.
std::unique_ptr<Communicator> make_solo_communicator();

struct MpiOptions {
  double timeout = 60;  // seconds without a sign of life after which a rank is lost
  // Called, in a thread of the communicator, when another rank is lost: ends the process with
  // Status::kPeer. The text is empty where another rank says it.
  std::function<void(const std::string&)> leave;
};
// Whether a launcher of MPI has started this process.
bool started_by_mpi();
// Joins the ranks that it started. Error(kUsage) where the build has no MPI.
std::unique_ptr<Communicator> make_mpi_communicator(const MpiOptions&);
// "Open MPI 4.1.4", or empty.
std::string mpi_library();

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

}  // namespace ddpm
