#include "engine_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace transformer_ext {

namespace py = pybind11;
using namespace engine;

namespace {

// A part of a model that the engine does not have.
struct UnsupportedModel : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

using FloatArray = py::array_t<float, py::array::c_style>;

// The value of a field with the given name among those that the engine knows.
template <class T>
T choose(const std::string& field, const std::string& value,
         const std::vector<std::pair<const char*, T>>& known) {
  std::string names;
  for (const auto& [name, result] : known) {
    if (value == name) return result;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  throw UnsupportedModel(field + " " + value + " is not known to the engine, which has " + names);
}

ModelConfig model_config(const py::dict& fields) {
  const auto integer = [&](const char* name) { return fields[name].cast<int64_t>(); };
  const auto flag = [&](const char* name) { return fields[name].cast<bool>(); };
  const auto text = [&](const char* name) { return fields[name].cast<std::string>(); };
  ModelConfig config;
  config.source_vocabulary = integer("src_vocab_size");
  config.target_vocabulary = integer("tgt_vocab_size");
  config.width = integer("d_model");
  config.heads = integer("nhead");
  config.kv_heads = integer("num_kv_heads");
  config.head_dim = integer("head_dim");
  config.encoder_layers = integer("num_encoder_layers");
  config.decoder_layers = integer("num_decoder_layers");
  config.inner = integer("dim_feedforward");
  config.activation = choose<Activation>("activation", text("activation"),
                                         {{"relu", Activation::relu},
                                          {"gelu", Activation::gelu},
                                          {"gelu_tanh", Activation::gelu_tanh},
                                          {"silu", Activation::silu},
                                          {"swiglu", Activation::swiglu},
                                          {"geglu", Activation::geglu},
                                          {"reglu", Activation::reglu}});
  config.norm_first = flag("norm_first");
  config.rms = choose<bool>("norm", text("norm"), {{"layer", false}, {"rms", true}});
  config.eps = fields["layer_norm_eps"].cast<float>();
  config.positions = choose<Positions>("positions", text("positions"),
                                       {{"none", Positions::none},
                                        {"sinusoidal", Positions::sinusoidal},
                                        {"sinusoidal_halves", Positions::sinusoidal_halves},
                                        {"learned", Positions::learned},
                                        {"rope", Positions::rope}});
  config.max_positions = integer("max_positions");
  config.tie = choose<Tying>(
      "tie", text("tie"), {{"none", Tying::none}, {"target", Tying::target}, {"all", Tying::all}});
  config.scale_embedding = flag("scale_embedding");
  config.embedding_norm = flag("embedding_norm");
  config.final_norm = flag("final_norm");
  config.bias = flag("bias");
  config.output_bias = flag("output_bias");
  return config;
}

std::unique_ptr<Engine> make_engine(const py::dict& config, const py::dict& weights, int threads) {
  Weights views;
  for (const auto& [name, value] : weights) {
    // Not converted: a copy of every weight would go unnoticed.
    if (!py::isinstance<FloatArray>(value)) {
      throw py::type_error("weight " + name.cast<std::string>() +
                           ": expected a contiguous float32 array");
    }
    const FloatArray array = py::reinterpret_borrow<FloatArray>(value);
    views[name.cast<std::string>()] = {
        array.data(), std::vector<int64_t>(array.shape(), array.shape() + array.ndim())};
  }
  const ModelConfig parsed = model_config(config);
  const py::gil_scoped_release release;
  return std::make_unique<Engine>(parsed, views, threads);
}

}  // namespace

void bind_engine(py::module_& m) {
  py::register_exception<UnsupportedModel>(m, "UnsupportedModel", PyExc_ValueError);

  py::class_<Hypothesis>(m, "Hypothesis")
      .def_readonly("tokens", &Hypothesis::tokens)
      .def_readonly("score", &Hypothesis::score)
      .def_readonly("log_prob", &Hypothesis::log_prob)
      .def_readonly("token_scores", &Hypothesis::token_scores)
      .def_readonly("ended", &Hypothesis::ended);

  py::class_<SearchResult>(m, "SearchResult")
      .def_readonly("hypotheses", &SearchResult::hypotheses)
      .def_readonly("steps", &SearchResult::steps)
      .def_property_readonly("stop", [](const SearchResult& result) {
        switch (result.stop) {
          case Stop::exact:
            return "exact";
          case Stop::first:
            return "first";
          case Stop::max_length:
            return "max_length";
          case Stop::none:
            break;
        }
        return "none";
      });

  py::class_<Engine>(m, "Engine", "An encoder-decoder Transformer with its weights, for decoding.")
      .def(py::init(&make_engine), py::arg("config"), py::arg("weights"), py::arg("threads"),
           "From the fields of TransformerConfig and float32 arrays by parameter name (copied).")
      .def_property_readonly("threads", &Engine::threads)
      .def(
          "search",
          [](Engine& engine, const std::vector<std::vector<int32_t>>& sources,
             const std::vector<int64_t>& limits, int64_t beam_size, int64_t num_hypotheses,
             int64_t min_length, bool stop_at_first, int32_t start_id, int32_t eos_id,
             std::vector<int32_t> suppressed, std::vector<double> ended_penalty,
             std::vector<double> cut_penalty) {
            SearchOptions options;
            options.beam_size = beam_size;
            options.num_hypotheses = num_hypotheses;
            options.min_length = min_length;
            options.stop_at_first = stop_at_first;
            options.start_id = start_id;
            options.eos_id = eos_id;
            options.suppressed = std::move(suppressed);
            options.ended_penalty = std::move(ended_penalty);
            options.cut_penalty = std::move(cut_penalty);
            const py::gil_scoped_release release;
            return engine.search(sources, limits, options);
          },
          py::kw_only(), py::arg("sources"), py::arg("limits"), py::arg("beam_size"),
          py::arg("num_hypotheses"), py::arg("min_length"), py::arg("stop_at_first"),
          py::arg("start_id"), py::arg("eos_id"), py::arg("suppressed"), py::arg("ended_penalty"),
          py::arg("cut_penalty"), "Beam search; see csrc/engine/search.h.")
      .def("score", &Engine::score, py::kw_only(), py::arg("sources"), py::arg("targets"),
           py::arg("start_id"), py::call_guard<py::gil_scoped_release>(),
           "Log-probabilities of the tokens of each target; see csrc/engine/search.h.");
}

}  // namespace transformer_ext
