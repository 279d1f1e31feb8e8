// NCCL as far as ranks use it, over Open MPI and on host memory, in place of the library's own
// functions. Stricter than NCCL: an operation before the ranks have met, one that is not the same
// on all ranks, one on the default stream, or a second operation before the first one was polled,
// is an error. FAKE_NCCL=fail:N: operation N ends in an error that only a look finds; also says how
// long an abort takes: FAKE_NCCL=fail:N,abort:SECONDS.
#include <mpi.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/bf16.h"
#include "tests/simt/host_lane.h"

using ddpm::bf16;
using ddpm::test::HostLane;

namespace {

constexpr int kPollsToMeet = 3;

int setting(const char* name) {
  const char* all = std::getenv("FAKE_NCCL");
  const char* at = all == nullptr ? nullptr : std::strstr(all, name);
  return at == nullptr ? 0 : std::atoi(at + std::strlen(name));
}

}  // namespace

struct ncclComm {
  int rank = 0, size = 1;
  int polls = 0;                   // until what is under way has ended
  std::atomic<int> operations{0};  // that have run
  std::atomic<bool> failed{false};
  std::string error;
  bool in_group = false, finalized = false;
  struct Message {
    bool send;
    const void* from;
    void* to;
    int count, peer;
  };
  std::vector<Message> messages;  // of the open group
  cudaStream_t stream = nullptr;  // of these
};

namespace {

// A group may be opened before it is known whose.
ncclComm* the_comm = nullptr;

ncclResult_t refuse(ncclComm* comm, const std::string& why) {
  comm->error = why;
  comm->failed = true;
  return ncclInvalidUsage;
}

// Whether all ranks have come to the same operation.
bool same_on_all(ncclComm* comm, const std::string& what) {
  constexpr size_t kLength = 96;
  std::vector<char> all(kLength * static_cast<size_t>(comm->size));
  char* own = all.data() + kLength * static_cast<size_t>(comm->rank);
  std::snprintf(own, kLength, "%s", what.c_str());
  MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all.data(), kLength, MPI_BYTE, MPI_COMM_WORLD);
  for (int r = 0; r < comm->size; ++r)
    if (std::strcmp(all.data() + kLength * static_cast<size_t>(r), own) != 0) {
      refuse(comm, what + " where rank " + std::to_string(r) + " has " +
                       (all.data() + kLength * static_cast<size_t>(r)));
      return false;
    }
  return true;
}

template <typename F>
ncclResult_t enqueue(ncclComm* comm, cudaStream_t stream, const std::string& what, F work) {
  if (comm->polls > 0) return refuse(comm, what + ": asked before the last answer was waited for");
  if (stream == nullptr) return refuse(comm, what + ": not on a lane");
  reinterpret_cast<HostLane*>(stream)->add(what, [=] {
    if (comm->failed || !same_on_all(comm, what)) return;
    if (++comm->operations == setting("fail:")) {
      refuse(comm, "planted");
      return;
    }
    work();
  });
  comm->polls = 1;
  return ncclInProgress;
}

}  // namespace

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t r) {
  return r == ncclSuccess ? "no error" : "an error";
}
const char* ncclGetLastError(ncclComm_t comm) { return comm->error.c_str(); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::snprintf(id->internal, sizeof id->internal, "where process %d is", ::getpid());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  MPI_Init(nullptr, nullptr);
  auto* comm = new ncclComm;
  MPI_Comm_rank(MPI_COMM_WORLD, &comm->rank);
  MPI_Comm_size(MPI_COMM_WORLD, &comm->size);
  *out = the_comm = comm;
  comm->polls = kPollsToMeet;
  if (config->blocking != 0 || rank != comm->rank || size != comm->size)
    return refuse(comm, "the wrong ranks, or ranks that block");
  return same_on_all(comm, id.internal) ? ncclInProgress : ncclInvalidUsage;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  comm->polls = std::max(0, comm->polls - 1);
  *state = comm->failed ? ncclRemoteError : comm->polls > 0 ? ncclInProgress : ncclSuccess;
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  comm->finalized = true;
  comm->polls = 1;
  return ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!comm->finalized || comm->polls > 0) std::abort();
  MPI_Finalize();
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t) {
  std::this_thread::sleep_for(std::chrono::seconds(setting("abort:")));
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const bool narrow = type == ncclBfloat16;
  if (from != to || (type != ncclFloat32 && !narrow) || op != ncclSum)
    return refuse(comm, "an unknown sum");
  return enqueue(comm, stream, "all_reduce " + std::to_string(count), [=] {
    std::vector<float> wide;
    if (narrow)
      for (size_t i = 0; i < count; ++i) wide.push_back(ddpm::to_float(static_cast<bf16*>(to)[i]));
    MPI_Allreduce(MPI_IN_PLACE, narrow ? wide.data() : to, static_cast<int>(count), MPI_FLOAT,
                  MPI_SUM, MPI_COMM_WORLD);
    for (size_t i = 0; i < wide.size(); ++i) static_cast<bf16*>(to)[i] = ddpm::to_bf16(wide[i]);
  });
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  if (from != static_cast<char*>(to) + static_cast<size_t>(comm->rank) * count || type != ncclUint8)
    return refuse(comm, "an unknown gathering");
  return enqueue(comm, stream, "all_gather " + std::to_string(count), [=] {
    MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, to, static_cast<int>(count), MPI_BYTE,
                  MPI_COMM_WORLD);
  });
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  if (!comm->in_group || type != ncclFloat32) return refuse(comm, "a message outside a group");
  comm->stream = stream;
  comm->messages.push_back({true, from, nullptr, static_cast<int>(count), peer});
  return ncclSuccess;
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (!comm->in_group || type != ncclFloat32) return refuse(comm, "a message outside a group");
  comm->stream = stream;
  comm->messages.push_back({false, nullptr, to, static_cast<int>(count), peer});
  return ncclSuccess;
}
ncclResult_t ncclGroupStart() {
  the_comm->in_group = true;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  ncclComm* comm = the_comm;
  comm->in_group = false;
  const auto messages = std::exchange(comm->messages, {});
  return enqueue(comm, comm->stream, "messages " + std::to_string(messages.size()), [=] {
    std::vector<MPI_Request> requests(messages.size());
    for (size_t i = 0; i < messages.size(); ++i) {
      const auto& m = messages[i];
      if (m.send)
        MPI_Isend(m.from, m.count, MPI_FLOAT, m.peer, 0, MPI_COMM_WORLD, &requests[i]);
      else
        MPI_Irecv(m.to, m.count, MPI_FLOAT, m.peer, 0, MPI_COMM_WORLD, &requests[i]);
    }
    MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
  });
}
