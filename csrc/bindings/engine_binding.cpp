#include "engine_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "unlocked.h"

namespace transformer_ext {

namespace py = pybind11;
using namespace engine;

namespace {

// A part of a model that the engine does not have.
struct UnsupportedModel : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

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
  config.kind = choose<Kind>("kind", text("kind"),
                             {{kind_name(Kind::encoder_decoder), Kind::encoder_decoder},
                              {kind_name(Kind::decoder_only), Kind::decoder_only},
                              {kind_name(Kind::encoder_only), Kind::encoder_only}});
  switch (config.kind) {
    case Kind::encoder_decoder:
      config.source_vocabulary = integer("src_vocab_size");
      config.target_vocabulary = integer("tgt_vocab_size");
      config.encoder_layers = integer("num_encoder_layers");
      config.decoder_layers = integer("num_decoder_layers");
      config.tie =
          choose<Tying>("tie", text("tie"),
                        {{"none", Tying::none}, {"target", Tying::target}, {"all", Tying::all}});
      break;
    case Kind::decoder_only:
      config.target_vocabulary = integer("vocab_size");
      config.decoder_layers = integer("num_layers");
      config.tie = flag("tie") ? Tying::target : Tying::none;
      break;
    case Kind::encoder_only:
      config.source_vocabulary = integer("vocab_size");
      config.encoder_layers = integer("num_layers");
      config.token_types = integer("num_token_types");
      config.pooling = choose<Pooling>("pooling", text("pooling"),
                                       {{"first", Pooling::first}, {"mean", Pooling::mean}});
      config.pooler = flag("pooler");
      config.normalize = flag("normalize");
      config.labels = static_cast<int64_t>(py::len(fields["labels"]));
      config.masked_lm_head = flag("masked_lm_head");
      break;
  }
  config.width = integer("d_model");
  config.heads = integer("nhead");
  config.kv_heads = integer("num_kv_heads");
  config.head_dim = integer("head_dim");
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
  config.scale_embedding = flag("scale_embedding");
  config.embedding_norm = flag("embedding_norm");
  config.final_norm = flag("final_norm");
  config.bias = flag("bias");
  config.output_bias = flag("output_bias");
  return config;
}

std::unique_ptr<Engine> make_engine(const py::dict& config, const py::function& weights,
                                    int threads, const std::string& compute_type) {
  ModelConfig parsed = model_config(config);
  parsed.compute = choose<GemmType>(
      "compute_type", compute_type,
      {{"float32", GemmType::float32}, {"bfloat16", GemmType::bfloat16}, {"int8", GemmType::int8}});
  py::buffer_info held;
  Unlocked unlocked;
  const auto find = [&](const std::string& name) -> Array {
    const Locked locked(unlocked);
    held = py::buffer_info();  // before the next is read
    const py::str key(name);
    const auto weight = py::reinterpret_steal<py::object>(
        python_call([&] { return PyObject_CallOneArg(weights.ptr(), key.ptr()); }));
    if (!weight) throw py::error_already_set();
    if (weight.is_none()) return {};
    // A buffer, not an array: numpy would have to be imported. It is not converted: a copy of every
    // weight would go unnoticed.
    if (PyObject_CheckBuffer(weight.ptr())) held = py::buffer(weight).request();
    int64_t stride = sizeof(float);
    bool contiguous = held.format == py::format_descriptor<float>::format();
    for (py::ssize_t i = held.ndim - 1; contiguous && i >= 0; --i) {
      contiguous = held.shape[i] <= 1 || held.strides[i] == stride;
      stride *= held.shape[i];
    }
    if (!contiguous) {
      throw py::type_error("weight " + name + ": expected a contiguous float32 array");
    }
    return {static_cast<const float*>(held.ptr),
            std::vector<int64_t>(held.shape.begin(), held.shape.end())};
  };
  return std::make_unique<Engine>(parsed, find, threads);
}

SearchOptions search_options(const py::dict& fields) {
  const auto integer = [&](const char* name) { return fields[name].cast<int64_t>(); };
  const auto number = [&](const char* name) { return fields[name].cast<double>(); };
  const auto flag = [&](const char* name) { return fields[name].cast<bool>(); };
  SearchOptions options;
  options.beam_size = integer("beam_size");
  options.num_hypotheses = integer("num_hypotheses");
  options.early_stopping =
      choose<EarlyStopping>("early_stopping", fields["early_stopping"].cast<std::string>(),
                            {{"exact", EarlyStopping::exact},
                             {"first", EarlyStopping::first},
                             {"heuristic", EarlyStopping::heuristic}});
  options.beam_patience = number("beam_patience");
  options.rank_unfinished = flag("rank_unfinished");
  options.coverage_penalty = number("coverage_penalty");
  options.return_attention = flag("return_attention");
  options.sampling = flag("sampling");
  options.seed = fields["seed"].cast<uint64_t>();
  options.tokens.suppressed = fields["suppressed"].cast<std::vector<int32_t>>();
  options.tokens.no_repeat_ngram_size = integer("no_repeat_ngram_size");
  options.tokens.repetition_penalty = number("repetition_penalty");
  options.tokens.penalty_on_logits = flag("penalty_on_logits");
  options.tokens.eos_id = fields["eos_id"].cast<int32_t>();
  options.tokens.top_k = integer("top_k");
  options.tokens.top_p = number("top_p");
  options.tokens.temperature = number("temperature");
  options.start_id = fields["start_id"].cast<int32_t>();
  options.ended_penalty = fields["ended_penalty"].cast<std::vector<double>>();
  options.cut_penalty = fields["cut_penalty"].cast<std::vector<double>>();
  return options;
}

// So that Ctrl-C ends a long call: asks the interpreter, at most ten times a second, because
// another thread may hold its lock for long.
engine::BeforeStep signals(Unlocked& unlocked) {
  using Clock = std::chrono::steady_clock;
  return [&unlocked, next = Clock::now() + std::chrono::milliseconds(100)]() mutable {
    const Clock::time_point now = Clock::now();
    if (now < next) return;
    next = now + std::chrono::milliseconds(100);
    const Locked locked(unlocked);
    if (python_call(PyErr_CheckSignals) != 0) throw py::error_already_set();
  };
}

// [rows, ...] of the values, or None without any.
py::object matrix(const std::vector<float>& values, size_t rows) {
  if (values.empty()) return py::none();
  const std::vector<py::ssize_t> shape = {static_cast<py::ssize_t>(rows),
                                          static_cast<py::ssize_t>(values.size() / rows)};
  return py::array_t<float>(shape, values.data());
}

Texts texts(std::vector<std::vector<int32_t>> ids, std::vector<std::vector<int32_t>> token_types) {
  return {std::move(ids), std::move(token_types)};
}

// Results of a call that is made without the interpreter's lock: arrays, and where their values go.
struct Arrays {
  py::list arrays;
  std::vector<float*> places;

  void add(size_t rows, int64_t columns) {
    py::array_t<float> array({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(columns)});
    places.push_back(array.mutable_data());
    arrays.append(std::move(array));
  }
};

}  // namespace

void bind_engine(py::module_& m) {
  py::register_exception<UnsupportedModel>(m, "UnsupportedModel", PyExc_ValueError);

  py::class_<Hypothesis>(m, "Hypothesis")
      .def_readonly("tokens", &Hypothesis::tokens)
      .def_readonly("score", &Hypothesis::score)
      .def_readonly("log_prob", &Hypothesis::log_prob)
      .def_readonly("token_scores", &Hypothesis::token_scores)
      .def_property_readonly("end",
                             [](const Hypothesis& hypothesis) {
                               switch (hypothesis.end) {
                                 case End::eos:
                                   return "eos";
                                 case End::max_length:
                                   return "max_length";
                                 case End::no_token:
                                   break;
                               }
                               return "no_token";
                             })
      .def_property_readonly("attention", [](const Hypothesis& hypothesis) {
        return matrix(hypothesis.attention, hypothesis.token_scores.size());
      });

  py::class_<SearchResult>(m, "SearchResult")
      .def_readonly("hypotheses", &SearchResult::hypotheses)
      .def_readonly("steps", &SearchResult::steps)
      .def_property_readonly("stop", [](const SearchResult& result) {
        switch (result.stop) {
          case Stop::exact:
            return "exact";
          case Stop::first:
            return "first";
          case Stop::heuristic:
            return "heuristic";
          case Stop::sampled:
            return "sampled";
          case Stop::max_length:
            return "max_length";
          case Stop::no_token:
            return "no_token";
          case Stop::none:
            break;
        }
        return "none";
      });

  py::class_<TargetScores>(m, "TargetScores")
      .def_readonly("log_probs", &TargetScores::log_probs)
      .def_property_readonly("attention", [](const TargetScores& scores) {
        return matrix(scores.attention, scores.log_probs.size());
      });

  py::class_<Engine> engine(m, "Engine",
                            "A Transformer of any kind with its weights, for inference.");
  engine
      .def(py::init(&make_engine), py::arg("config"), py::arg("weights"), py::arg("threads"),
           py::arg("compute_type"),
           "From the kind and the fields of a ModelConfig and a function that gives the float32 "
           "array of a parameter's name, or None; it is copied before the next is asked for.")
      .def_property_readonly("threads", &Engine::threads)
      .def(
          "search",
          [](Engine& engine, const std::vector<std::vector<int32_t>>& sources,
             std::vector<std::vector<int32_t>> prefixes, const std::vector<int64_t>& limits,
             const std::vector<int64_t>& minima, const std::vector<uint64_t>& numbers,
             const py::dict& options, std::vector<Engine*> others,
             std::vector<int64_t> attention_layers, std::vector<std::vector<int32_t>> prompts) {
            const SearchOptions parsed = search_options(options);
            std::vector<Request> requests;
            for (size_t i = 0; i < limits.size(); ++i) {
              requests.push_back(
                  {std::move(prefixes.at(i)), limits[i], minima.at(i), numbers.at(i)});
              if (!prompts.empty()) requests.back().prompt = std::move(prompts.at(i));
            }
            Unlocked unlocked;
            return engine.search(
                sources, requests, parsed,
                {std::move(others), std::move(attention_layers), signals(unlocked)});
          },
          py::kw_only(), py::arg("sources"), py::arg("prefixes"), py::arg("limits"),
          py::arg("minima"), py::arg("numbers"), py::arg("options"), py::arg("others"),
          py::arg("attention_layers"), py::arg("prompts") = std::vector<std::vector<int32_t>>(),
          "Beam search or sampling; see csrc/engine/search.h.")
      .def(
          "score",
          [](Engine& engine, const std::vector<std::vector<int32_t>>& sources,
             const std::vector<std::vector<int32_t>>& targets, int32_t start_id,
             std::vector<Engine*> others, std::vector<int64_t> attention_layers) {
            Unlocked unlocked;
            return engine.score(
                sources, targets, start_id,
                {std::move(others), std::move(attention_layers), signals(unlocked)});
          },
          py::kw_only(), py::arg("sources"), py::arg("targets"), py::arg("start_id"),
          py::arg("others"), py::arg("attention_layers"),
          "Log-probabilities of the tokens of each target; see csrc/engine/search.h.");

  engine.def(
      "states",
      [](Engine& engine, std::vector<std::vector<int32_t>> ids,
         std::vector<std::vector<int32_t>> token_types) {
        const Texts asked = texts(std::move(ids), std::move(token_types));
        Arrays results;
        for (const auto& text : asked.ids) results.add(text.size(), engine.config().width);
        {
          Unlocked unlocked;
          engine.states(asked, results.places, signals(unlocked));
        }
        return results.arrays;
      },
      py::kw_only(), py::arg("ids"), py::arg("token_types"),
      "The states of the tokens of each text; see csrc/engine/text_encoder.h.");
  engine.def(
      "pooled",
      [](Engine& engine, std::vector<std::vector<int32_t>> ids,
         std::vector<std::vector<int32_t>> token_types) {
        const Texts asked = texts(std::move(ids), std::move(token_types));
        Arrays results;
        results.add(asked.ids.size(), engine.config().width);
        {
          Unlocked unlocked;
          engine.pooled(asked, results.places[0], signals(unlocked));
        }
        return py::object(results.arrays[0]);
      },
      py::kw_only(), py::arg("ids"), py::arg("token_types"),
      "A vector for each text; see csrc/engine/text_encoder.h.");
  engine.def(
      "label_scores",
      [](Engine& engine, std::vector<std::vector<int32_t>> ids,
         std::vector<std::vector<int32_t>> token_types) {
        const Texts asked = texts(std::move(ids), std::move(token_types));
        Arrays results;
        results.add(asked.ids.size(), engine.config().labels);
        {
          Unlocked unlocked;
          engine.label_scores(asked, results.places[0], signals(unlocked));
        }
        return py::object(results.arrays[0]);
      },
      py::kw_only(), py::arg("ids"), py::arg("token_types"),
      "Scores of the labels for each text; see csrc/engine/text_encoder.h.");
  engine.def(
      "token_scores",
      [](Engine& engine, std::vector<std::vector<int32_t>> ids,
         std::vector<std::vector<int32_t>> token_types,
         const std::vector<std::vector<int32_t>>& positions) {
        const Texts asked = texts(std::move(ids), std::move(token_types));
        Arrays results;
        if (engine.config().masked_lm_head) {
          for (const auto& rows : positions) {
            results.add(rows.size(), engine.config().source_vocabulary);
          }
        }
        {
          Unlocked unlocked;
          engine.token_scores(asked, positions, results.places, signals(unlocked));
        }
        return results.arrays;
      },
      py::kw_only(), py::arg("ids"), py::arg("token_types"), py::arg("positions"),
      "Scores of the vocabulary at some tokens of each text; see csrc/engine/text_encoder.h.");

  m.def(
      "release_memory",
      [] {
#if defined(__GLIBC__)
        malloc_trim(0);
#endif
      },
      "Gives freed memory back to the system, where the allocator would keep it.");
}

}  // namespace transformer_ext
