// The program: its command line, and errors as one line and an exit code.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <new>

#include "engine/nearest_name.h"
#include "tools/commands.h"

namespace ddpm::tools {
namespace {

constexpr uint64_t kMaxSeed = uint64_t{1} << 63;

void add_device_flags(CLI::App* app, DeviceOptions& o) {
  app->add_option("--device", o.device, "auto, cpu, cuda or cuda:I")->capture_default_str();
  app->add_option("--precision", o.precision,
                  "auto, fp32 (direct convolution only), tf32 or bf16 (CUDA)")
      ->capture_default_str();
  app->add_option("--threads", o.threads, "CPU threads; default all")->check(CLI::Range(1, 1024));
}

void add_rank_flags(CLI::App* app, RankOptions& o) {
  app->add_option("--gpus", o.gpus, "ranks on so many GPUs of this machine")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app->add_option("--comm-timeout", o.timeout,
                  "seconds without a sign of life after which another rank is lost")
      ->check(CLI::Range(1.0, 86400.0))
      ->capture_default_str();
}

// A flag that stands for one setting of the run's config.
void add_setting(CLI::App* app, TrainArgs& args, const char* flag, const char* path,
                 const char* help) {
  app->add_option_function<std::string>(
      flag,
      [&args, path](const std::string& v) {
        args.settings.push_back(format("%s=%s", path, v.c_str()));
      },
      help);
}

void add_train(CLI::App& program, TrainArgs& args, Status& status) {
  CLI::App* app = program.add_subcommand("train", "Train a model on a data set");
  app->add_option("--data", args.data,
                  "shapes, a CIFAR-10 binary folder, a folder of PNG/JPEG, or a packed file")
      ->required();
  app->add_option("--preset", args.preset, "tiny (default), cifar10, celebahq256 or lsun256");
  app->add_option("--config", args.config, "a run's config.json to take everything from");
  app->add_option("--out", args.out, "run folder; default runs/PRESET");
  add_setting(app, args, "--steps", "train.steps", "the step the run ends at");
  add_setting(app, args, "--batch-size", "train.batch_size", "images per update");
  add_setting(app, args, "--learning-rate", "train.learning_rate", "after warm-up");
  add_setting(app, args, "--seed", "train.seed", "of weights, order, noise; default 0");
  app->add_option_function<std::string>(
         "--flip",
         [&args](const std::string& v) {
           args.settings.push_back(v == "on" ? "train.flip=true" : "train.flip=false");
         },
         "on or off: horizontal flips")
      ->check(CLI::IsMember({"on", "off"}));
  add_setting(app, args, "--dropout", "train.dropout", "probability of dropping an activation");
  add_setting(app, args, "--loss", "train.loss",
              "simple (default), kl (the bound) or hybrid (both, for a learned_range)");
  add_setting(app, args, "--label-dropout", "train.label_dropout",
              "probability of dropping an image's class, for sampling with --guidance; default 0");
  add_device_flags(app, args.device);
  add_rank_flags(app, args.ranks);
  app->add_option("--resume", args.resume,
                  "auto (go on with the run in --out), never, or a checkpoint folder to start from")
      ->capture_default_str();
  add_setting(app, args, "--save-every", "train.save_every", "steps; 0 = at the end only");
  add_setting(app, args, "--keep-last", "train.keep_last", "checkpoints kept; 0 = all; default 3");
  add_setting(app, args, "--keep-every", "train.keep_every",
              "checkpoints of multiples of this are kept for good; default none");
  add_setting(app, args, "--sample-every", "train.sample_every", "steps; 0 = never");
  add_setting(app, args, "--log-every", "train.log_every", "steps");
  add_setting(app, args, "--accumulate", "train.accumulate",
              "parts that a rank cuts its share of the batch into, for want of memory; default 1");
  add_setting(app, args, "--reduction-shards", "train.reduction_shards",
              "a power of two, at least the ranks: a result that does not depend on their number");
  add_setting(app, args, "--gradient-sums", "train.gradient_sums",
              "over ranks in fp32 (default), or in bf16: half the bytes, 8 bits of each gradient");
  app->add_flag_function(
      "--stop-on-divergence",
      [&args](int64_t) { args.settings.push_back("train.stop_on_divergence=true"); },
      "stop, with exit code 7, where the loss says that the training diverges");
  app->add_option_function<std::vector<std::string>>(
      "--set",
      [&args](const std::vector<std::string>& all) {
        args.settings.insert(args.settings.end(), all.begin(), all.end());
      },
      "path=value: any setting of config.json, e.g. train.ema_decay=0.999");
  app->footer("Example: ddpm train --data shapes --steps 2000 --out runs/try");
  app->callback([&] { status = run_train(args); });
}

void add_replay(CLI::App& program, ReplayArgs& args) {
  CLI::App* app = program.add_subcommand(
      "replay", "Run the step after a run's last checkpoint, operation by operation");
  app->add_option("--run", args.run, "run folder, or the nonfinite folder that a run left")
      ->required();
  add_device_flags(app, args.device);
  app->footer("Example: ddpm replay --run runs/try/nonfinite");
  app->callback([&] { run_replay(args); });
}

// How the chains of a sampler go.
void add_chain_flags(CLI::App* app, ChainArgs& args) {
  app->add_option("--sampler", args.sampler, "ddpm (default), ddim or dpmpp2m");
  CLI::Option* steps =
      app->add_option("--steps", args.steps, "default 1000 (ddpm), 50 (ddim), 20 (dpmpp2m)");
  CLI::Option* spacing =
      app->add_option("--spacing", args.spacing, "leading, trailing or linspace");
  app->add_option("--timesteps", args.timesteps, "the model's timesteps to use, e.g. 0,100,400,999")
      ->delimiter(',')
      ->excludes(steps)
      ->excludes(spacing);
  app->add_option("--eta", args.eta, "ddim's share of noise")->capture_default_str();
  app->add_option("--clip", args.clip,
                  "on or off: clip the prediction of the image; default as the model says")
      ->check(CLI::IsMember({"on", "off"}));
  app->add_option("--label", args.label, "class of all images; default image number mod classes");
  app->add_option("--guidance", args.guidance,
                  "how much the class counts: 0 not at all, 1 as learned, more beyond that")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
}

void add_sample(CLI::App& program, SampleArgs& args, Status& status) {
  CLI::App* app = program.add_subcommand("sample", "Draw images from a model");
  app->add_option("--model", args.model, "run folder, checkpoint or diffusers folder")->required();
  app->add_option("--out", args.out,
                  "FILE.png (one grid), FILE.npz, FILE.safetensors, or a folder of PNGs")
      ->required();
  app->add_option("--num", args.num, "images")->capture_default_str();
  app->add_option("--first", args.first, "number of the first image")->capture_default_str();
  app->add_option("--batch-size", args.batch_size,
                  "of a rank; default as many as it has to draw, at most 64")
      ->check(CLI::Range(1, 1 << 20));
  add_chain_flags(app, args.chain);
  app->add_option("--seed", args.seed, "image k is a function of model, seed and k")
      ->check(CLI::Range(uint64_t{0}, kMaxSeed))
      ->capture_default_str();
  CLI::Option* init =
      app->add_option("--init", args.init, "safetensors file with x_T, F32 [N,C,H,W]");
  CLI::Option* from = app->add_option("--from", args.from,
                                      "images to start from, with noise: as --data of train, a "
                                      "PNG or JPEG file, or a .safetensors that sample wrote")
                          ->excludes(init);
  app->add_option("--strength", args.strength,
                  "how much of the chain is run on --from: 1 leaves nothing of the images")
      ->needs(from)
      ->capture_default_str();
  app->add_option("--invert", args.invert,
                  "images, as for --from: write the x_T that ddim with --clip off makes them of")
      ->excludes(init)
      ->excludes(from);
  CLI::Option* suspend = app->add_option(
      "--suspend", args.suspend,
      "FILE.safetensors that a signal has the chains written to, to go on with --resume");
  app->add_option("--suspend-at", args.suspend_at, "write it after this many steps")
      ->needs(suspend)
      ->check(CLI::PositiveNumber);
  CLI::Option* resume =
      app->add_option("--resume", args.resume, "go on with what --suspend wrote, to the same bits");
  for (CLI::Option* of_chain : app->get_options())
    for (const char* name :
         {"--num", "--first", "--label", "--guidance", "--batch-size", "--sampler", "--steps",
          "--spacing", "--timesteps", "--eta", "--clip", "--seed", "--init", "--from", "--invert"})
      if (of_chain->check_name(name)) resume->excludes(of_chain);
  app->add_flag("--batch-invariant", args.device.batch_invariant,
                "the same bits for an image whatever the batch size");
  add_device_flags(app, args.device);
  add_rank_flags(app, args.ranks);
  app->footer("Example: ddpm sample --model runs/tiny --out grid.png --sampler ddim");
  app->callback([&] { status = run_sample(args); });
}

void add_progressive(CLI::App& program, ProgressiveArgs& args) {
  CLI::App* app = program.add_subcommand(
      "progressive",
      "Draw what a chain takes for the image as it goes, or what one latent may become");
  app->add_option("--model", args.model, "as for sample")->required();
  app->add_option("--out", args.out, "FILE.png")->required();
  app->add_option("--num", args.num, "images, a row each")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app->add_option("--columns", args.columns, "predictions, evenly over the timesteps")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app->add_option(
         "--shared", args.shared,
         "timesteps, e.g. 999,749,499,249: for each a row, the latent that the first image "
         "has there, and --num ends that its chain may come to")
      ->delimiter(',');
  app->add_option("--first", args.first, "number of the first image")->capture_default_str();
  add_chain_flags(app, args.chain);
  app->add_option("--seed", args.seed, "as for sample")
      ->check(CLI::Range(uint64_t{0}, kMaxSeed))
      ->capture_default_str();
  add_device_flags(app, args.device);
  app->footer("Example: ddpm progressive --model runs/tiny --out progressive.png");
  app->callback([&] { run_progressive(args); });
}

void add_interpolate(CLI::App& program, InterpolateArgs& args) {
  CLI::App* app =
      program.add_subcommand("interpolate", "Draw images between two, mixed as latents");
  app->add_option("--model", args.model, "as for sample")->required();
  app->add_option("--from", args.from, "as for sample: its first two images are a pair, and so on")
      ->required();
  app->add_option("--out", args.out, "FILE.png")->required();
  app->add_option("--num", args.num, "pairs, a row each")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app->add_option("--columns", args.columns, "mixes, from the one image to the other")
      ->check(CLI::Range(2, 1024))
      ->capture_default_str();
  app->add_option("--latents", args.latents,
                  "diffused (with noise up to --timestep) or ddim (led back by ddim)")
      ->check(CLI::IsMember({"diffused", "ddim"}))
      ->capture_default_str();
  app->add_option("--mix", args.mix, "linear or spherical; default linear, of ddim's spherical")
      ->check(CLI::IsMember({"linear", "spherical"}));
  app->add_option("--timestep", args.timestep, "of diffused latents; default half of the model's");
  app->add_option("--first", args.first, "number of the first pair, for the noise")
      ->capture_default_str();
  add_chain_flags(app, args.chain);
  app->add_option("--seed", args.seed, "of the noise")
      ->check(CLI::Range(uint64_t{0}, kMaxSeed))
      ->capture_default_str();
  add_device_flags(app, args.device);
  app->footer("Example: ddpm interpolate --model runs/tiny --from shapes --out between.png");
  app->callback([&] { run_interpolate(args); });
}

void add_eval(CLI::App& program, EvalArgs& args, Status& status) {
  CLI::App* app = program.add_subcommand(
      "eval", "Measure how well a model codes a data set, or how near its images come to it");
  CLI::Option* model = app->add_option("--model", args.model, "as for sample");
  app->add_option("--data", args.data, "as for train");
  app->add_option("--metric", args.metric,
                  "nll (bits per dimension), rd (rate and distortion of progressive coding), fid "
                  "(Frechet inception distance of --model's images and --data) or is (inception "
                  "score)")
      ->check(CLI::IsMember({"nll", "rd", "fid", "is"}))
      ->capture_default_str();
  app->add_option("--split", args.split,
                  "train or test, of CIFAR-10 and shapes; default test where there is one, of fid "
                  "train")
      ->check(CLI::IsMember({"train", "test"}));
  app->add_option("--num", args.num,
                  "images, chosen by the seed; default all; of fid and is the images to draw, "
                  "default 50000, or the first of --images")
      ->check(CLI::PositiveNumber);
  app->add_option("--seed", args.seed, "of the noise and the choice of images")
      ->check(CLI::Range(uint64_t{0}, kMaxSeed))
      ->capture_default_str();
  app->add_option("--out", args.out,
                  "FILE.json; what a signal stops is kept beside it, and the same command goes on");
  app->add_option("--batch-size", args.batch_size,
                  "changes no result; default 64, or 8 of images above 64x64; of fid and is as for "
                  "sample, default 64")
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--inception", args.inception,
                  "of fid and is: weights, which tools/convert_inception.py makes");
  app->add_option("--statistics", args.statistics,
                  "of fid: FILE.safetensors with the statistics of --data, read if it holds them, "
                  "else written");
  app->add_option("--images", args.images, "of fid and is: as --data, in the place of --model")
      ->excludes(model);
  add_chain_flags(app, args.chain);
  add_device_flags(app, args.device);
  add_rank_flags(app, args.ranks);
  app->footer(
      "Examples: ddpm eval --model runs/tiny --data shapes --num 16 --out nll.json\n"
      "          ddpm eval --metric fid --model runs/tiny --data shapes --sampler ddim "
      "--inception inception.safetensors --statistics shapes.safetensors --out fid.json");
  app->callback([&] { status = run_eval(args); });
}

void add_paper(CLI::App& program, PaperArgs& args, Status& status) {
  CLI::App* app =
      program.add_subcommand("paper", "A model beside the paper's figures and tables, as a page");
  app->add_option("--model", args.model, "as for sample; of a run folder, its loss is shown too")
      ->required();
  app->add_option("--data", args.data, "as for train")->required();
  app->add_option("--out", args.out, "FILE.html, which holds all it shows")->capture_default_str();
  app->add_option("--split", args.split, "as for eval --metric nll")
      ->check(CLI::IsMember({"train", "test"}));
  app->add_option("--num", args.num, "images that the bound is evaluated on: T passes each")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  CLI::Option* inception = app->add_option("--inception", args.inception,
                                           "as for eval: FID and inception score as well");
  app->add_option("--fid-num", args.fid_num, "images that are drawn for those")
      ->check(CLI::PositiveNumber)
      ->needs(inception)
      ->capture_default_str();
  app->add_option("--seed", args.seed, "of all images and noise")
      ->check(CLI::Range(uint64_t{0}, kMaxSeed))
      ->capture_default_str();
  app->add_option("--batch-size", args.batch_size, "as for eval")->check(CLI::Range(1, 1 << 20));
  add_chain_flags(app, args.chain);
  add_device_flags(app, args.device);
  app->footer("Example: ddpm paper --model runs/tiny --data shapes --sampler ddim --steps 100");
  app->callback([&] { status = run_paper(args); });
}

void add_probe(CLI::App& program, ProbeArgs& args) {
  CLI::App* app = program.add_subcommand(
      "probe", "Run a model once on given inputs, to compare with other frameworks");
  app->require_subcommand(1);
  const auto add = [&](const char* what, const char* help) {
    CLI::App* sub = app->add_subcommand(what, help);
    sub->add_option("--model", args.model, "as for sample")->required();
    sub->add_option("--input", args.input, "safetensors file")->required();
    sub->add_option("--out", args.out, "safetensors file")->required();
    add_device_flags(sub, args.device);
    sub->callback([&args, what] {
      args.what = what;
      run_probe(args);
    });
  };
  add("forward", "sample F32 [N,C,H,W], timestep I64 [N] -> model_output");
  add("gradient", "x0, timestep, noise -> loss and the gradient of every weight");
}

void add_pack(CLI::App& program, PackOptions& args) {
  CLI::App* app =
      program.add_subcommand("pack", "Make one file of equally sized images from a folder");
  app->add_option("source", args.source, "image folder, CIFAR-10 binary folder or packed file")
      ->required();
  app->add_option("--out", args.out, "FILE.safetensors")->required();
  app->add_option_function<std::string>(
      "--size",
      [&args](const std::string& v) {
        char end = 0;
        if (std::sscanf(v.c_str(), "%dx%d%c", &args.h, &args.w, &end) != 2 || args.h < 1 ||
            args.w < 1)
          throw CLI::ValidationError("--size", "write HxW, e.g. 64x64");
      },
      "HxW; default the images' own");
  app->add_option("--channels", args.channels, "1, 3 or 4")->check(CLI::IsMember({1, 3, 4}));
  app->callback([&] { run_pack(args); });
}

void add_info(CLI::App& program, InfoArgs& args) {
  CLI::App* app = program.add_subcommand("info", "Parameters, memory and work of a model");
  CLI::Option* model = app->add_option("--model", args.model, "as for sample");
  CLI::Option* preset = app->add_option("--preset", args.preset, "as for train");
  model->excludes(preset);
  app->add_option("--batch-size", args.batch_size, "default the preset's, or 1")
      ->check(CLI::Range(1, 1 << 20));
  CLI::Option* ranks =
      app->add_option("--ranks", args.ranks, "what a step takes on 1, 2, 4 ... of them")
          ->check(CLI::Range(1, 1 << 20));
  CLI::Option* bandwidth =
      app->add_option("--bandwidth", args.bandwidth, "GB/s that a rank sends and receives at once")
          ->check(CLI::PositiveNumber);
  CLI::Option* step =
      app->add_option("--step-ms", args.step_ms,
                      "of one rank with --batch-size images, as ddpm bench train measures it")
          ->check(CLI::PositiveNumber);
  ranks->needs(bandwidth)->needs(step);
  bandwidth->needs(ranks);
  step->needs(ranks);
  app->add_option("--latency", args.latency, "microseconds of a message between ranks")
      ->needs(ranks)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->footer("Example: ddpm info --preset cifar10 --ranks 64 --bandwidth 40 --step-ms 16");
  app->callback([&] {
    if (args.model.empty() && args.preset.empty()) throw CLI::RequiredError("--model or --preset");
    run_info(args);
  });
}

void add_bench(CLI::App& program, BenchArgs& args) {
  CLI::App* app = program.add_subcommand("bench", "Time training, sampling or single operations");
  app->require_subcommand(1);
  const auto add = [&](const char* work, const char* help) {
    CLI::App* sub = app->add_subcommand(work, help);
    sub->add_option("--preset", args.preset, "as for train")->capture_default_str();
    sub->add_option("--model", args.model, "as for sample");
    sub->add_option("--batch-size", args.batch_size, "images per step")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    sub->add_option("--steps", args.steps, "timed steps")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    sub->add_option("--json", args.json, "file for the result");
    sub->add_flag("--wgmma", args.device.wgmma,
                  "our own convolutions by wgmma, which no GPU has run yet (docs/gpu_only.md)");
    add_device_flags(sub, args.device);
    sub->callback([&args, work] {
      args.work = work;
      run_bench(args);
    });
  };
  add("train", "a whole training step");
  add("sample", "a denoising step");
  add("ops", "each operation of a training step");
  CLI::App* ceilings = app->add_subcommand("ceilings", "The rates of memory and of products");
  ceilings->add_option("--json", args.json, "file for the result");
  add_device_flags(ceilings, args.device);
  ceilings->callback([&args] {
    args.work = "ceilings";
    run_bench_ceilings(args);
  });
}

std::vector<std::string> subcommand_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(sub->get_name());
  return names;
}

// "unknown flag --stepz; did you mean --steps?"
std::string explain(const CLI::App& program, const CLI::ParseError& error) {
  const CLI::App* app = &program;
  while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
  std::string text = error.what();
  const std::vector<std::string> rest = program.remaining(true);
  if (!rest.empty()) {
    const std::string& word = rest.front();
    std::vector<std::string> names = subcommand_names(*app);
    for (const CLI::Option* o : app->get_options()) names.push_back(o->get_name());
    text = format("unknown %s %s%s", word.starts_with("-") ? "flag" : "word", word.c_str(),
                  did_you_mean(word, names).c_str());
  }
  return text + format(" (see ddpm%s%s --help)", app == &program ? "" : " ",
                       app == &program ? "" : app->get_name().c_str());
}

int run(int argc, char** argv) {
  CLI::App program("Trains and samples denoising diffusion models (DDPM, Ho et al. 2020).", "ddpm");
  program.set_version_flag("--version", version_text());
  program.require_subcommand(1);
  Status status = Status::kOk;
  TrainArgs train;
  ReplayArgs replay;
  SampleArgs sample;
  ProgressiveArgs progressive;
  InterpolateArgs interpolate;
  EvalArgs eval;
  PaperArgs paper;
  ProbeArgs probe;
  PackOptions pack;
  InfoArgs info;
  BenchArgs bench;
  add_train(program, train, status);
  add_replay(program, replay);
  add_sample(program, sample, status);
  add_progressive(program, progressive);
  add_interpolate(program, interpolate);
  add_eval(program, eval, status);
  add_paper(program, paper, status);
  add_probe(program, probe);
  add_pack(program, pack);
  add_info(program, info);
  add_bench(program, bench);
  program.add_subcommand("doctor", "What works on this machine, and how to get what does not")
      ->callback([&] { status = run_doctor(); });
  try {
    program.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return program.exit(e);
  } catch (const CLI::ParseError& e) {
    std::fprintf(stderr, "ddpm: %s\n", explain(program, e).c_str());
    return static_cast<int>(Status::kUsage);
  }
  return static_cast<int>(status);
}

}  // namespace
}  // namespace ddpm::tools

int main(int argc, char** argv) {
  using ddpm::Status;
  std::signal(SIGXFSZ, SIG_IGN);  // a file over its limit is a failed write, which is reported
  try {
    return ddpm::tools::run(argc, argv);
  } catch (const ddpm::Error& e) {
    std::fprintf(stderr, "ddpm: %s\n", e.what());
    return static_cast<int>(e.status());
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "ddpm: out of memory; use a smaller --batch-size\n");
    return static_cast<int>(Status::kMemory);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "ddpm: internal error: %s; please report it\n", e.what());
    return static_cast<int>(Status::kBug);
  }
}
