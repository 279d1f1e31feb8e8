#include "kernels/cuda/cudnn.h"

#include <cudnn.h>

#include <algorithm>
#include <array>
#include <deque>
#include <type_traits>

#include "kernels/error.h"

namespace ddpm::cuda {
namespace {

[[noreturn]] void fail_cudnn(const char* call, cudnnStatus_t status, const std::string& what) {
  std::array<char, 512> detail{};
  cudnnGetLastErrorString(detail.data(), detail.size());
  fail(Status::kDevice, "%s: %s in %s%s%s", what.c_str(), cudnnGetErrorString(status), call,
       detail[0] == '\0' ? "" : ": ", detail.data());
}

void check(const char* call, cudnnStatus_t status, const std::string& what) {
  if (status != CUDNN_STATUS_SUCCESS) fail_cudnn(call, status, what);
}

bool unsupported(cudnnStatus_t status) {
  return CUDNN_STATUS_CATEGORY(status) == CUDNN_STATUS_NOT_SUPPORTED;
}

// cuDNN's name of a C++ type as the value of an attribute.
template <typename T>
constexpr cudnnBackendAttributeType_t attribute_type() {
  if constexpr (std::is_same_v<T, int64_t>) return CUDNN_TYPE_INT64;
  if constexpr (std::is_same_v<T, float>) return CUDNN_TYPE_FLOAT;
  if constexpr (std::is_same_v<T, bool>) return CUDNN_TYPE_BOOLEAN;
  if constexpr (std::is_same_v<T, char>) return CUDNN_TYPE_CHAR;
  if constexpr (std::is_same_v<T, void*>) return CUDNN_TYPE_VOID_PTR;
  if constexpr (std::is_same_v<T, cudnnHandle_t>) return CUDNN_TYPE_HANDLE;
  if constexpr (std::is_same_v<T, cudnnDataType_t>) return CUDNN_TYPE_DATA_TYPE;
  if constexpr (std::is_same_v<T, cudnnConvolutionMode_t>) return CUDNN_TYPE_CONVOLUTION_MODE;
  if constexpr (std::is_same_v<T, cudnnPointwiseMode_t>) return CUDNN_TYPE_POINTWISE_MODE;
  if constexpr (std::is_same_v<T, cudnnBackendHeurMode_t>) return CUDNN_TYPE_HEUR_MODE;
  if constexpr (std::is_same_v<T, cudnnBackendKnobType_t>) return CUDNN_TYPE_KNOB_TYPE;
  if constexpr (std::is_same_v<T, cudnnBackendNumericalNote_t>) return CUDNN_TYPE_NUMERICAL_NOTE;
  if constexpr (std::is_same_v<T, cudnnBackendBehaviorNote_t>) return CUDNN_TYPE_BEHAVIOR_NOTE;
}

class Descriptor {
 public:
  Descriptor(cudnnBackendDescriptorType_t type, const std::string& what) : what_(what) {
    check("cudnnBackendCreateDescriptor", cudnnBackendCreateDescriptor(type, &descriptor_), what_);
  }
  ~Descriptor() {
    if (descriptor_ != nullptr) cudnnBackendDestroyDescriptor(descriptor_);
  }
  Descriptor(Descriptor&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, nullptr)), what_(std::move(other.what_)) {}
  Descriptor& operator=(Descriptor&&) = delete;

  cudnnBackendDescriptor_t get() const { return descriptor_; }

  template <typename T>
  Descriptor& set(cudnnBackendAttributeName_t name, std::span<const T> values) {
    return set(name, attribute_type<T>(), values.data(), values.size());
  }
  template <typename T>
  Descriptor& set(cudnnBackendAttributeName_t name, const T& value) {
    return set(name, std::span<const T>(&value, 1));
  }
  Descriptor& set(cudnnBackendAttributeName_t name, const Descriptor& value) {
    return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, &value.descriptor_, 1);
  }
  Descriptor& set_descriptors(cudnnBackendAttributeName_t name,
                              const std::vector<cudnnBackendDescriptor_t>& values) {
    return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, values.data(), values.size());
  }

  template <typename T>
  T get(cudnnBackendAttributeName_t name) const {
    T value{};
    fill(name, attribute_type<T>(), &value, 1);
    return value;
  }
  // At most `most` values.
  template <typename T>
  std::vector<T> list(cudnnBackendAttributeName_t name, size_t most) const {
    std::vector<T> values(most);
    values.resize(fill(name, attribute_type<T>(), values.data(), most));
    return values;
  }
  // Descriptors, of which cuDNN fills ones that are made beforehand; the number of those filled.
  size_t fill(cudnnBackendAttributeName_t name, std::span<const Descriptor> values) const {
    std::vector<cudnnBackendDescriptor_t> raw;
    for (const Descriptor& d : values) raw.push_back(d.descriptor_);
    return fill(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, raw.data(), raw.size());
  }

  void finish() { check("cudnnBackendFinalize", cudnnBackendFinalize(descriptor_), what_); }
  // False where cuDNN does not support what is described.
  bool try_finish() {
    const cudnnStatus_t status = cudnnBackendFinalize(descriptor_);
    if (unsupported(status)) return false;
    check("cudnnBackendFinalize", status, what_);
    return true;
  }

 private:
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                  const void* values, size_t count) {
    const cudnnStatus_t status =
        cudnnBackendSetAttribute(descriptor_, name, type, static_cast<int64_t>(count), values);
    if (status != CUDNN_STATUS_SUCCESS)
      fail_cudnn(format("cudnnBackendSetAttribute(%d)", name).c_str(), status, what_);
    return *this;
  }
  size_t fill(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, void* values,
              size_t most) const {
    int64_t count = 0;
    const cudnnStatus_t status = cudnnBackendGetAttribute(
        descriptor_, name, type, static_cast<int64_t>(most), &count, values);
    if (status != CUDNN_STATUS_SUCCESS)
      fail_cudnn(format("cudnnBackendGetAttribute(%d)", name).c_str(), status, what_);
    return std::min(static_cast<size_t>(count), most);
  }

  cudnnBackendDescriptor_t descriptor_ = nullptr;
  std::string what_;
};

cudnnDataType_t data_type(DType type) {
  DDPM_CHECK(type == DType::kF32 || type == DType::kBF16, "cuDNN: type %s", name_of(type));
  return type == DType::kBF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_FLOAT;
}

}  // namespace

std::string cudnn_version() {
  const size_t v = cudnnGetVersion();
  return format("%zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

// ---- target ----

struct CudnnTarget::State {
  cudnnHandle_t handle = nullptr;         // of a device that is there
  std::unique_ptr<Descriptor> described;  // or the description of another
  StandIn stand_in;

  State() = default;
  State(const State&) = delete;
  ~State() {
    if (handle != nullptr) cudnnDestroy(handle);
  }
};

CudnnTarget CudnnTarget::current_device() {
  auto state = std::make_shared<State>();
  check("cudnnCreate", cudnnCreate(&state->handle), "cuDNN");
  CudnnTarget target;
  target.state_ = std::move(state);
  return target;
}

CudnnTarget CudnnTarget::described(const std::string& properties, StandIn stand_in) {
  auto state = std::make_shared<State>();
  state->stand_in = std::move(stand_in);
  state->described =
      std::make_unique<Descriptor>(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, "device properties");
  state->described->set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION,
                        std::span<const char>(properties.c_str(), properties.size() + 1));
  state->described->finish();
  CudnnTarget target;
  target.state_ = std::move(state);
  return target;
}

bool CudnnTarget::live() const { return state_->handle != nullptr; }

// ---- graph ----

struct CudnnGraph::State {
  std::shared_ptr<const CudnnTarget::State> target;
  std::string what;
  std::deque<Descriptor> parts;  // operations and what they consist of
  std::vector<const Descriptor*> tensors;
  std::vector<cudnnBackendDescriptor_t> operations;
  CudnnProgram program;  // the same in our words
  std::unique_ptr<Descriptor> graph;

  Descriptor& part(cudnnBackendDescriptorType_t type) { return parts.emplace_back(type, what); }
  const Descriptor& at(int tensor) const { return *tensors.at(static_cast<size_t>(tensor)); }
  // On a device that is there, the graph's handle says which.
  void set_device(Descriptor& d, cudnnBackendAttributeName_t name) const {
    if (target->described) d.set(name, *target->described);
  }
  int add_tensor(const CudnnTensor& tensor, std::array<int64_t, 4> strides, int64_t alignment);
  Descriptor engine(int64_t id) const;
  CudnnNotes notes(const Descriptor& engine) const;
  CudnnCandidate candidate(const Descriptor& config) const;
  void pointwise(cudnnPointwiseMode_t mode, int x, int b, int y);
};

// Strides in cuDNN's order N, C, H, W.
int CudnnGraph::State::add_tensor(const CudnnTensor& tensor, std::array<int64_t, 4> strides,
                                  int64_t alignment) {
  const Shape& s = tensor.shape;
  DDPM_CHECK(s.positive(), "%s: cuDNN tensor %s", what.c_str(), to_string(s).c_str());
  const std::array<int64_t, 4> dims{s.n, s.c, s.h, s.w};
  const int id = static_cast<int>(tensors.size());
  Descriptor& t = part(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, int64_t{id})
      .set(CUDNN_ATTR_TENSOR_DATA_TYPE, data_type(tensor.type))
      .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, alignment)
      .set(CUDNN_ATTR_TENSOR_DIMENSIONS, std::span<const int64_t>(dims))
      .set(CUDNN_ATTR_TENSOR_STRIDES, std::span<const int64_t>(strides))
      .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, tensor.is_virtual)
      .finish();
  tensors.push_back(&t);
  program.tensors.push_back(tensor);
  return id;
}

CudnnGraph::CudnnGraph(const CudnnTarget& target, std::string what)
    : state_(std::make_unique<State>()) {
  state_->target = target.state_;
  state_->what = std::move(what);
}
CudnnGraph::~CudnnGraph() = default;

int CudnnGraph::tensor(const Shape& s, DType type, bool is_virtual) {
  const int64_t c = s.c, row = c * s.w, image = row * s.h;
  return state_->add_tensor({s, type, is_virtual, image}, {image, 1, row, c}, 16);
}

int CudnnGraph::rows(int n, int c, DType type, int64_t stride, int64_t alignment) {
  return state_->add_tensor({{n, 1, 1, c}, type, false, stride}, {stride, 1, stride, stride},
                            alignment);
}

void CudnnGraph::convolution(ConvPass pass, const ConvDesc& d, int x, int filter, int y) {
  const std::array<int64_t, 2> before{d.pad_top, d.pad_left}, after{d.pad_bottom, d.pad_right};
  const std::array<int64_t, 2> strides{d.stride, d.stride}, dilations{1, 1};
  Descriptor& conv = state_->part(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
  conv.set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, int64_t{2})
      .set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_DATA_FLOAT)
      .set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_CROSS_CORRELATION)
      .set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, std::span<const int64_t>(before))
      .set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, std::span<const int64_t>(after))
      .set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, std::span<const int64_t>(strides))
      .set(CUDNN_ATTR_CONVOLUTION_DILATIONS, std::span<const int64_t>(dilations))
      .finish();

  struct Names {
    cudnnBackendDescriptorType_t type;
    cudnnBackendAttributeName_t conv, x, filter, y, alpha, beta;
  };
  static constexpr Names kNames[] = {
      {CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
       CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
       CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
       CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
       CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA},
      {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA},
      {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
       CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA}};
  const Names& names = kNames[static_cast<size_t>(pass)];
  Descriptor& op = state_->part(names.type);
  op.set(names.conv, conv)
      .set(names.x, state_->at(x))
      .set(names.filter, state_->at(filter))
      .set(names.y, state_->at(y))
      .set(names.alpha, 1.0f)
      .set(names.beta, 0.0f)
      .finish();
  state_->operations.push_back(op.get());
  state_->program.operations.push_back({CudnnOperation::kConvolution, {x, filter, y}, pass, d});
}

void CudnnGraph::State::pointwise(cudnnPointwiseMode_t mode, int x, int b, int y) {
  Descriptor& how = part(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  how.set(CUDNN_ATTR_POINTWISE_MODE, mode)
      .set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_DATA_FLOAT)
      .finish();
  Descriptor& op = part(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how)
      .set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, at(x))
      .set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, at(y));
  if (b >= 0) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, at(b));
  op.finish();
  operations.push_back(op.get());
}

void CudnnGraph::add(int a, int b, int sum) {
  state_->pointwise(CUDNN_POINTWISE_ADD, a, b, sum);
  state_->program.operations.push_back({CudnnOperation::kAdd, {a, b, sum}});
}
void CudnnGraph::identity(int x, int y) {
  state_->pointwise(CUDNN_POINTWISE_IDENTITY, x, -1, y);
  state_->program.operations.push_back({CudnnOperation::kIdentity, {x, y}});
}

void CudnnGraph::finish() {
  state_->graph =
      std::make_unique<Descriptor>(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, state_->what);
  state_->graph->set_descriptors(CUDNN_ATTR_OPERATIONGRAPH_OPS, state_->operations);
  if (state_->target->handle != nullptr)
    state_->graph->set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, state_->target->handle);
  state_->graph->finish();
}

// ---- engines ----

Descriptor CudnnGraph::State::engine(int64_t id) const {
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR, what);
  engine.set(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, *graph).set(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, id);
  set_device(engine, CUDNN_ATTR_ENGINE_DEVICEPROP);
  return engine;
}

CudnnNotes CudnnGraph::State::notes(const Descriptor& engine) const {
  CudnnNotes notes;
  for (const auto note : engine.list<cudnnBackendNumericalNote_t>(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                                                                  CUDNN_NUMERICAL_NOTE_TYPE_COUNT))
    switch (note) {
      case CUDNN_NUMERICAL_NOTE_TENSOR_CORE:
        notes.tensor_core = true;
        break;
      case CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS:
        notes.down_convert_inputs = true;
        break;
      case CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION:
        notes.reduced_precision_reduction = true;
        break;
      case CUDNN_NUMERICAL_NOTE_FFT:
        notes.fft = true;
        break;
      case CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC:
        notes.nondeterministic = true;
        break;
      case CUDNN_NUMERICAL_NOTE_WINOGRAD:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_4x4:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_6x6:
      case CUDNN_NUMERICAL_NOTE_WINOGRAD_TILE_13x13:
        notes.winograd = true;
        break;
      default:
        break;
    }
  for (const auto note : engine.list<cudnnBackendBehaviorNote_t>(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE,
                                                                 CUDNN_BEHAVIOR_NOTE_TYPE_COUNT))
    if (note == CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION) notes.runtime_compiled = true;
  return notes;
}

CudnnCandidate CudnnGraph::State::candidate(const Descriptor& config) const {
  const Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR, what);
  config.fill(CUDNN_ATTR_ENGINECFG_ENGINE, std::span(&engine, 1));
  CudnnCandidate found;
  found.engine.id = engine.get<int64_t>(CUDNN_ATTR_ENGINE_GLOBAL_INDEX);
  found.notes = notes(engine);
  std::vector<Descriptor> choices;
  for (int i = 0; i < CUDNN_KNOB_TYPE_COUNTS; ++i)
    choices.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, what);
  const size_t count = config.fill(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, choices);
  for (size_t i = 0; i < count; ++i)
    found.engine.knobs.emplace_back(
        choices[i].get<cudnnBackendKnobType_t>(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE),
        choices[i].get<int64_t>(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE));
  return found;
}

std::vector<CudnnCandidate> CudnnGraph::candidates(CudnnHeuristic mode) const {
  static constexpr cudnnBackendHeurMode_t kModes[] = {CUDNN_HEUR_MODE_B, CUDNN_HEUR_MODE_A,
                                                      CUDNN_HEUR_MODE_FALLBACK};
  Descriptor heuristic(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, state_->what);
  heuristic.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, *state_->graph)
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, kModes[static_cast<size_t>(mode)]);
  state_->set_device(heuristic, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP);
  if (!heuristic.try_finish()) return {};

  constexpr int kMost = 64;
  std::vector<Descriptor> configs;
  for (int i = 0; i < kMost; ++i)
    configs.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, state_->what);
  const size_t count = heuristic.fill(CUDNN_ATTR_ENGINEHEUR_RESULTS, configs);
  std::vector<CudnnCandidate> found;
  for (size_t i = 0; i < count; ++i) found.push_back(state_->candidate(configs[i]));
  return found;
}

CudnnNotes CudnnGraph::notes(const CudnnEngine& e) const {
  Descriptor engine = state_->engine(e.id);
  engine.finish();
  return state_->notes(engine);
}

// ---- plans ----

struct CudnnPlan::State {
  std::shared_ptr<const CudnnTarget::State> target;
  std::string what;
  Descriptor plan;
  CudnnProgram program;
  std::vector<int64_t> ids;  // of the tensors that are in memory
};

CudnnPlan::CudnnPlan(std::unique_ptr<State> state, size_t workspace)
    : state_(std::move(state)), workspace_(workspace) {}
CudnnPlan::~CudnnPlan() = default;

std::shared_ptr<const CudnnPlan> CudnnGraph::plan(const CudnnEngine& e) const {
  const std::string& what = state_->what;
  Descriptor engine = state_->engine(e.id);
  if (!engine.try_finish()) return nullptr;
  std::vector<Descriptor> knobs;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (const auto& [type, value] : e.knobs) {
    Descriptor& knob = knobs.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, what);
    knob.set(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, static_cast<cudnnBackendKnobType_t>(type))
        .set(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, value)
        .finish();
    raw.push_back(knob.get());
  }
  Descriptor config(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, what);
  config.set(CUDNN_ATTR_ENGINECFG_ENGINE, engine);
  if (!raw.empty()) config.set_descriptors(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, raw);
  if (!config.try_finish()) return nullptr;

  Descriptor plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, what);
  plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
  if (state_->target->handle != nullptr)
    plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, state_->target->handle);
  state_->set_device(plan, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP);
  const cudnnStatus_t status = cudnnBackendFinalize(plan.get());
  // What was compiled at run time is loaded at once, for which a described device is not enough.
  const bool not_loaded =
      state_->target->handle == nullptr && status == CUDNN_STATUS_EXECUTION_FAILED_CUDA_DRIVER;
  if (unsupported(status) || status == CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED ||
      (not_loaded && !state_->target->stand_in))
    return nullptr;
  if (!not_loaded) check("cudnnBackendFinalize", status, what);

  const int64_t workspace =
      not_loaded ? 0 : plan.get<int64_t>(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE);
  std::vector<int64_t> ids;
  for (size_t i = 0; i < state_->program.tensors.size(); ++i)
    if (!state_->program.tensors[i].is_virtual) ids.push_back(static_cast<int64_t>(i));
  auto state = std::unique_ptr<CudnnPlan::State>(
      new CudnnPlan::State{state_->target, what, std::move(plan), state_->program, std::move(ids)});
  return std::shared_ptr<CudnnPlan>(
      new CudnnPlan(std::move(state), static_cast<size_t>(workspace)));
}

void CudnnPlan::run(void* stream, std::span<void* const> pointers, void* workspace) const {
  const State& s = *state_;
  if (s.target->handle == nullptr) {
    DDPM_CHECK(s.target->stand_in != nullptr, "%s: planned for a device that is not there",
               s.what.c_str());
    s.target->stand_in(s.program, pointers, workspace, workspace_);
    return;
  }
  // From here on, only on a GPU.
  std::vector<void*> present;
  for (int64_t id : s.ids) present.push_back(pointers[static_cast<size_t>(id)]);
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, s.what);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, std::span<const int64_t>(s.ids))
      .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, std::span<void* const>(present))
      .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, workspace)
      .finish();
  check("cudnnSetStream", cudnnSetStream(s.target->handle, static_cast<cudaStream_t>(stream)),
        s.what);
  check("cudnnBackendExecute", cudnnBackendExecute(s.target->handle, s.plan.get(), pack.get()),
        s.what);
}

}  // namespace ddpm::cuda
