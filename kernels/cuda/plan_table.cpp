#include "kernels/cuda/plan_table.h"

#include <nlohmann/json.hpp>

#include "kernels/error.h"

namespace ddpm::cuda {
namespace {

using nlohmann::json;

void require(bool condition, const std::string& name, const std::string& where,
             const char* expected) {
  if (!condition)
    fail(Status::kConfig, "%s: plan table: %s must be %s", name.c_str(), where.c_str(), expected);
}

const json& member(const json& object, const char* key, const std::string& name,
                   const std::string& where) {
  require(object.is_object() && object.contains(key), name, where,
          format("an object with \"%s\"", key).c_str());
  return object.at(key);
}

CudnnEngine engine_from_json(const json& value, const std::string& name, const std::string& where) {
  CudnnEngine engine;
  const json& id = member(value, "engine", name, where);
  require(id.is_number_integer() && id >= 0, name, where + ".engine", "a number");
  engine.id = id.get<int64_t>();
  const json& knobs = member(value, "knobs", name, where);
  require(knobs.is_array() && knobs.size() <= 64, name, where + ".knobs", "a list");
  for (const json& knob : knobs) {
    require(knob.is_array() && knob.size() == 2 && knob[0].is_number_integer() &&
                knob[1].is_number_integer() && knob[0] >= 0 && knob[0] <= 0xFFFF,
            name, where + ".knobs", "a list of pairs of numbers");
    engine.knobs.emplace_back(knob[0].get<int>(), knob[1].get<int64_t>());
  }
  return engine;
}

}  // namespace

nlohmann::ordered_json to_json(const PlanTable& table) {
  nlohmann::ordered_json plans = nlohmann::ordered_json::object();
  for (const auto& [key, choice] : table.choices) {
    nlohmann::ordered_json knobs = nlohmann::ordered_json::array();
    for (const auto& [type, value] : choice.engine.knobs)
      knobs.push_back(nlohmann::ordered_json::array({type, value}));
    plans[key] = {{"variant", choice.variant}, {"engine", choice.engine.id}, {"knobs", knobs}};
  }
  return {{"library", table.library}, {"plans", plans}};
}

PlanTable plan_table_from_json(const json& value, const std::string& name) {
  PlanTable table;
  const json& library = member(value, "library", name, "it");
  require(library.is_string(), name, "library", "a string");
  table.library = library.get<std::string>();
  const json& plans = member(value, "plans", name, "it");
  require(plans.is_object(), name, "plans", "an object");
  for (const auto& [key, choice] : plans.items()) {
    const json& variant = member(choice, "variant", name, key);
    require(variant.is_string(), name, key + ".variant", "a string");
    table.choices[key] = {variant.get<std::string>(), engine_from_json(choice, name, key)};
  }
  return table;
}

}  // namespace ddpm::cuda
