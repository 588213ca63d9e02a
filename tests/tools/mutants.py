"""Break the code in one place at a time, and see whether the tests that ought to notice do.

    python tests/tools/mutants.py [--only WORD] [--jobs 2]

Each mutant replaces texts that must occur exactly once by others, in a copy of the tree, and runs the tests named with
it. Prints a line per mutant, and at the end those that no test noticed; exit status 1 if there are any, or if a text no
longer applies.
"""

import argparse
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")

LOOP = "test_training.py::test_the_updates_of_a_script_are_those_of_a_plain_loop"
VRNN, VAE, IWAE, DREG, RESAMPLED, PUBLISHED_VAE, PUBLISHED_IWAE, LSTM = (
    f"{LOOP}[{objective}]"
    for objective in (
        "VRNN",
        "VAE",
        "IWAE",
        "DReG",
        "resampled",
        "published-VAE",
        "published-IWAE",
        "LSTM",
    )
)
LAST_FRAME = "test_training.py::test_a_filter_whose_states_are_carried_on_resamples_at_its_last_frame_and_at_no_other"
BOUNDS = "test_evaluation.py::test_bounds_and_spread_of_five_particles_equal_those_computed_by_hand"
SUMMARIES = "test_evaluation.py::test_summaries_of_three_windows_equal_those_computed_by_hand"
TABLE = "test_evaluation.py::test_the_table_of_windows_holds_bounds_alone_in_nats_per_frame"
WINDOWS = "test_evaluation.py::test_every_batch_of_windows_is_dequantised_with_noise_of_its_own"
FILTERED_WINDOWS = (
    "test_evaluation.py::test_the_particle_filter_of_a_window_counts_all_of_its_frames"
)
RECORDINGS = "test_evaluation.py::test_the_standard_error_over_recordings_is_that_of_a_ratio"
MONITOR = "test_evaluation.py::test_the_bounds_in_the_log_are_those_of_the_averaged_weights"
BEST = "test_evaluation.py::test_best_pt_holds_the_averaged_weights_of_the_highest_iwae"
TEST_SPLIT = "test_evaluation.py::test_the_test_split_is_evaluated_with_the_weights_of_best_pt"
OTHER_DATA = "test_evaluate.py::test_other_data_are_normalised_as_the_training_was"
PLAIN_MODEL = "test_model.py::test_rollout_and_gradients_equal_the_plain_implementation[5]"
GENERATION = "test_model.py::test_generation_is_the_prior_and_decoder_that_training_scores"
LIKELIHOOD = "test_likelihood.py::test"
IMPLIED = f"{LIKELIHOOD}_the_density_of_frames_is_the_gaussian_that_the_filters_imply"
WINDOWED = f"{LIKELIHOOD}_windows_in_sequence_equal_one_long_one"
STABLE = f"{LIKELIHOOD}_reflection_coefficients_stay_below_one_and_poles_inside_the_unit_circle"
PLAIN_LIKELIHOOD = f"{LIKELIHOOD}_rollout_and_gradients_equal_the_plain_ones"
SAMPLED = f"{LIKELIHOOD}_samples_have_the_mean_and_covariance_that_the_filters_imply"
GENERATED = f"{LIKELIHOOD}_generation_is_the_prior_and_decoder_that_training_scores"
UNFILTERED = f"{LIKELIHOOD}_it_starts_without_a_filter_and_learns_one"
FIXED_Z = f"{LIKELIHOOD}_densities_at_fixed_z_are_those_of_the_rollout"
EXACT = f"{LIKELIHOOD}_without_latent_variables_every_bound_is_the_likelihood"
INITIAL = "test_model.py::test_initialisation_scales_with_fan_in_and_keeps_a_signal_at_any_width"
DENSITIES = "test_bounds.py::test_analytic_kl_and_densities_equal_torch_distributions"
FORMULAS = "test_bounds.py::test_objectives_equal_their_formulas_written_out"
FILTER = "test_bounds.py::test_the_particle_filter_equals_a_plain_one_and_so_does_the_gradient_along_its_ancestors"
PUBLISHED_COLUMNS = (
    "test_published.py::test_weight_norm_rescales_every_published_column_of_w_and_nothing_else"
)
NOT_FINITE = "test_scripts.py::test_steps_that_are_not_finite_change_nothing_and_are_counted"
RESUME = "test_training.py::test_a_run_that_is_stopped_within_an_excerpt_and_resumed_is_the_one_that_was_not"
RESTORED = "test_scripts.py::test_restoring_leaves_a_training_and_its_progress_in_place"
OTHER_RUN = "test_scripts.py::test_other_data_under_the_same_name_is_refused_on_resume"
TWO_PROCESSES = "test_scale.py::test_two_processes_compute_the_gradient_of_one"
OTHER_NUMBER = "test_scale.py::test_a_job_goes_on_with_another_number_of_processes"
TYPES = "test_hyperparameters.py::test_an_added_field_is_a_flag_of_its_own_type"
DEMO = "test_hyperparameters.py::test_the_demo_is_small_and_leaves_what_is_given_as_it_is"
REFUSED = "test_hyperparameters.py::test_a_flag_of_another_type_or_name_or_out_of_range_is_refused_in_one_line"
HELP = "test_hyperparameters.py::test_the_comment_behind_a_field_is_its_help_with_the_default"
UNTYPED = "test_hyperparameters.py::test_a_line_that_cannot_become_a_flag_is_refused_by_name_and_by_its_file"
NEEDIEST = "test_data.py::test_a_recording_goes_whole_to_the_split_that_is_furthest_below_its_share_of_samples"
OF_TRAIN = "test_data.py::test_statistics_are_those_of_train_alone"
ONE_WRITER = "test_data.py::test_two_conversions_cannot_write_the_same_file"
PCM = "test_data.py::test_pcm_of_every_type_becomes_the_same_int16"
PICKLES = "test_data.py::test_an_array_of_arrays_is_refused_but_for_allow_pickle"

FLAC_SIZE = "test_yardsticks.py::test_flac_counts_the_audio_of_each_window_and_not_its_header"
LPC = "test_yardsticks.py::test_the_linear_prediction_is_that_of_a_plain_loop_for_every_memory_and_first_level"
LPC_FIT = "test_yardsticks.py::test_a_level_that_changes_is_followed_and_quiet_samples_count_as_much_as_loud_ones"
HISTOGRAM = "test_yardsticks.py::test_the_histogram_has_the_entropy_of_the_samples_in_whole_windows"
RESYNTHESIS = (
    "test_likelihood.py::test_resynthesis_follows_x_in_h_and_z_and_what_was_drawn_in_the_filter"
)
GOES_ON = "test_likelihood.py::test_what_is_generated_goes_on_from_a_state"
DRAWN = "test_likelihood.py::test_a_frame_is_drawn_as_if_sample_by_sample"
INTERVALS = "test_plot.py::test_intervals_are_those_of_student_and_differences_are_paired_by_seed"
REFERENCES = (
    "test_plot.py::test_runs_are_compared_with_those_of_the_first_folder_but_for_another_likelihood"
)
LIMITS = "test_plot.py::test_settings_in_which_runs_of_a_name_differ_are_said_in_words_in_all_folders_alike"
NUMBERS = "test_readme.py::test_what_is_not_in_the_logs_is_noticed"
SUBCLASS = (
    "test_bounds.py::test_the_filter_runs_what_a_subclass_of_the_vrnn_has_in_place_of_its_call"
)
PASSED_OVER = (
    "test_bounds.py::test_a_network_with_a_layer_that_the_recurrence_would_pass_over_is_refused"
)
OF_A_USER = "test_evaluation.py::test_a_model_is_evaluated_as_such_and_with_its_buffers_as_they_are"
STAYS = "test_evaluate.py::test_what_belongs_to_the_training_stays_as_the_checkpoint_has_it"
FOREIGN = "test_readme.py::test_a_checkpoint_of_a_foreign_model_is_refused_by_our_scripts_and_one_of_ours_by_its_script"
STALE = "test_scripts.py::test_a_run_that_goes_on_has_no_evaluation_of_what_it_was"
IN_STEP = "test_data.py::test_an_mp3_of_varying_rate_is_read_as_in_one_piece"
BY_NAME = "test_data.py::test_the_splits_depend_on_names_alone"

PLOT, CHECK = "plot_recon.py", "tests/experiments/check_readme.py"
COMMON, ALT, GAUSS, IWAE_SCRIPT = (
    "common.py",
    "vrnn_gauss_alt_nll.py",
    "vrnn_gauss.py",
    "vrnn_gauss_iwae.py",
)

MUTANTS = (  # what is wrong, the test that must fail, and (file, text, text in its place), once or several times
    # ---- carried states ----
    (
        "no carry of state between windows",
        VRNN,
        COMMON,
        "before.zero_() if window == 0 else before.copy_(after)",
        "before.zero_()",
    ),
    (
        "carry of state across excerpts",
        VRNN,
        COMMON,
        "before.zero_() if window == 0 else before.copy_(after)",
        "before.copy_(after)",
    ),
    (
        "published replays start from the new state",
        PUBLISHED_VAE,
        COMMON,
        "        if replay == 0:\n",
        "        if True:\n",
        COMMON,
        "before.zero_() if window == 0 else",
        "before.zero_() if window == replay == 0 else",
    ),
    (
        "the state of the particle filter is not carried on",
        RESAMPLED,
        IWAE_SCRIPT,
        "training.model(x_TBX, state, noise, h.k, filtering.ancestors)",
        "training.model(x_TBX, None, noise, h.k, filtering.ancestors)",
    ),
    (
        "a filter that ignores its incoming state",
        FILTER,
        COMMON,
        "frame_log_w_BK, particles = weigh(t, state, frame_noise)",
        "frame_log_w_BK, particles = weigh(t, state if t else None, frame_noise)",
    ),
    (
        "a lean step in which only h goes on with its parent",
        FILTER,
        COMMON,
        "add_(gates[theirs]), c[theirs])",
        "add_(gates[theirs]), c[:len(theirs)])",
    ),
    (
        "a lean step in which a child hears the frame of another sequence",
        FILTER,
        COMMON,
        "from_x[t, parents // k]",
        "from_x[t, parents % x_TBX.shape[1]]",
    ),
    (
        "ancestors chosen, and not gone on with",
        FILTER,
        COMMON,
        "                    part.copy_(part[ancestors[t]])\n",
        "                    pass\n",
    ),
    (
        "only h goes on with an ancestor",
        FILTER,
        COMMON,
        "for part in (h_at[t + 1], c_at[t + 1]):",
        "for part in (h_at[t + 1],):",
    ),
    (
        "gradients that do not find the ancestor",
        FILTER,
        COMMON,
        "d_h, d_c = (torch.zeros_like(d).index_add_(0, ctx.ancestors[t], d) for d in (d_h, d_c))",
        "pass",
    ),
    (
        "the frame of a resampling counted after it",
        FILTER,
        IWAE_SCRIPT,
        "resampled_TB.cumsum(0) - resampled_TB.long()",
        "resampled_TB.cumsum(0)",
    ),
    (
        "ancestors of the first sequence for all",
        FILTER,
        COMMON,
        "torch.where(resampled_B1, own_BK[:, :1] + drawn_BK, own_BK)",
        "torch.where(resampled_B1, drawn_BK, own_BK[0])",
    ),
    (
        "steps without the posterior's density",
        FILTER,
        COMMON,
        "log_px[0] + (log_pz - log_qz).view(-1, k)",
        "log_px[0] + log_pz.view(-1, k)",
    ),
    (
        "the first window of an excerpt, again and again",
        VRNN,
        COMMON,
        "self.read_ahead[batch].result()[window]",
        "self.read_ahead[batch].result()[0]",
    ),
    (
        "the batch after the one that was asked for",
        VRNN,
        COMMON,
        "self.read_ahead[batch].result()",
        "self.read_ahead[batch + 1].result()",
    ),
    # ---- the step ----
    (
        "grad_clip ten times too large",
        VRNN,
        COMMON,
        "torch.tensor(h.grad_clip or math.inf",
        "torch.tensor(10 * h.grad_clip or math.inf",
    ),
    (
        "published gradient not divided before the clip",
        PUBLISHED_IWAE,
        COMMON,
        "if divide_by != 1:",
        "if False:",
    ),
    (
        "published gradient not divided, in the VAE_K script",
        PUBLISHED_VAE,
        ALT,
        "divide_by=h.batch_size if h.as_published else 1",
        "divide_by=1",
    ),
    (
        "the published limit not divided",
        PUBLISHED_IWAE,
        COMMON,
        "self.grad_clip / divide_by *",
        "self.grad_clip *",
    ),
    (
        "clipped updates counted by the divided limit",
        PUBLISHED_IWAE,
        COMMON,
        "norm > self.grad_clip)",
        "norm > self.grad_clip / divide_by)",
    ),
    (
        "weight norm never applied",
        VRNN,
        COMMON,
        "self.model.constrain_weights(h.weight_norm)",
        "pass",
    ),
    (
        "weight norm of the recurrent weights too",
        PUBLISHED_COLUMNS,
        COMMON,
        ' and name != "lstm_h":',
        ":",
    ),
    (
        "weight norm over outputs",
        VRNN,
        COMMON,
        "layer.weight.norm(dim=1, keepdim=True)",
        "layer.weight.norm(dim=0, keepdim=True)",
    ),
    (
        "average of weights off by one update",
        VRNN,
        COMMON,
        "share = 1 - ((1 + counts.updates)",
        "share = 1 - ((2 + counts.updates)",
    ),
    (
        "average of the weights before the step",
        VRNN,
        COMMON,
        "            averaged.lerp_(p, share)\n",
        "            pass\n",
        COMMON,
        "        if replace_non_finite:\n",
        "        share = 1 - ((1 + self.counts.updates) / (10 + self.counts.updates)).clamp(max=h.ema)\n"
        "        for averaged, p in zip(self.averaged.parameters(), self.model.parameters()):\n"
        "            averaged.lerp_(p, share)\n        if replace_non_finite:\n",
    ),
    ("mirror() never called", VRNN, COMMON, "        model.mirror()\n", "        pass\n"),
    (
        "a learning rate that falls to nothing",
        PUBLISHED_VAE,
        COMMON,
        ".clamp(min=0.01)",
        ".clamp(min=0.0)",
    ),
    (
        "a gradient that is not finite moves the state",
        NOT_FINITE,
        COMMON,
        "carried.copy_(torch.where(is_finite, part, 0.0))",
        "carried.copy_(part)",
    ),
    (
        "a gradient that is not finite moves the parameters",
        NOT_FINITE,
        COMMON,
        "self.optimiser.found_inf = (~is_finite).float()",
        "pass",
    ),
    (
        "the gradients of updates add up",
        VRNN,
        COMMON,
        "        self.optimiser.zero_grad()\n        if h.weight_norm:",
        "        if h.weight_norm:",
    ),
    (
        "the mean loss of all updates so far",
        VRNN,
        COMMON,
        "        counts.loss_sum.zero_()\n        counts.losses.zero_()\n",
        "",
    ),
    # ---- noise in training ----
    (
        "no dequantisation in training",
        VRNN,
        COMMON,
        "x_TBX = normalise(self.pcm, self.corpus, uniform)",
        "x_TBX = normalise(self.pcm, self.corpus)",
    ),
    (
        "x_noise never applied",
        VRNN,
        COMMON,
        "x_TBX = x_TBX + sigma * self.draw(",
        "x_TBX = x_TBX + 0 * self.draw(",
    ),
    (
        "x_noise on the target alone",
        VRNN,
        COMMON,
        "        if h.x_noise:\n",
        "        self.model.clean = x_TBX\n        if h.x_noise:\n",
        COMMON,
        "state\n        phi_x = self.phi_x(x_TBX.bfloat16() if self.bf16 else x_TBX)",
        "state\n        phi_x = self.phi_x(getattr(self, 'clean', x_TBX))",
    ),
    (
        "x_noise on the input alone",
        VRNN,
        COMMON,
        "        if h.x_noise:\n",
        "        self.model.clean = x_TBX\n        if h.x_noise:\n",
        COMMON,
        "        log_px, memory = self.likelihood.log_density(x_TBX, decoded, memory, k)\n        log_pz = ",
        "        log_px, memory = self.likelihood.log_density(getattr(self, 'clean', x_TBX), decoded, memory, k)\n"
        "        log_pz = ",
    ),
    (
        "x_noise that falls to a tenth",
        VRNN,
        COMMON,
        "h.x_noise * 0.01 ** done",
        "h.x_noise * 0.1 ** done",
    ),
    (
        "x_noise that never ends",
        PUBLISHED_VAE,
        COMMON,
        "torch.where(done < 1, ",
        "torch.where(done < 99, ",
    ),
    # ---- excerpts ----
    (
        "the same order in every epoch",
        VRNN,
        COMMON,
        "default_rng((self.seed, epoch))",
        "default_rng((self.seed, 0))",
    ),
    (
        "excerpts that begin at the beginning of a recording",
        VRNN,
        COMMON,
        " + np.repeat(shift, self.counts)",
        "",
    ),
    (
        "an excerpt over the end of its recording",
        VRNN,
        COMMON,
        "np.repeat(shift, self.counts)",
        "np.repeat(shift + 1, self.counts)",
    ),
    (
        "held-out windows that overlap",
        WINDOWS,
        COMMON,
        "+ nth * samples\n",
        "+ nth * (samples // 2)\n",
    ),
    # ---- conversion ----
    (
        "a recording to the split that has most",
        NEEDIEST,
        COMMON,
        "neediest = max(writers,",
        "neediest = min(writers,",
    ),
    (
        "mean and standard deviation of the test split",
        OF_TRAIN,
        COMMON,
        "(mean, std), *_ = [",
        "*_, (mean, std) = [",
    ),
    (
        "half a recording stays",
        NEEDIEST,
        COMMON,
        "        self.audio.resize((self.offsets[-1],))\n",
        "",
    ),
    (
        "two conversions into one file",
        ONE_WRITER,
        COMMON,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH",
    ),
    (
        "an .mp3 read on after a seek",
        IN_STEP,
        "prepare_blizzard.py",
        "file.seekable = lambda: False",
        "pass",
    ),
    (
        "files in the order of the arguments",
        BY_NAME,
        "prepare_blizzard.py",
        "sorted(found.values(), key=lambda one: common.natural_order(one[0]))",
        "list(found.values())",
    ),
    (
        "arrays of arrays read in any case",
        PICKLES,
        COMMON,
        "functools.partial(np.load, allow_pickle=allow_pickle,",
        "functools.partial(np.load, allow_pickle=True,",
        COMMON,
        'mmap_mode=None if allow_pickle else "r"',
        "mmap_mode=None",
    ),
    # ---- objectives ----
    ("--dreg runs the plain objective", DREG, IWAE_SCRIPT, "elif h.dreg:", "elif False:"),
    (
        "DReG with weights that are not squared",
        DREG,
        IWAE_SCRIPT,
        "v_BK ** 2 * (log_w_BK + log_q_TBK.sum(0))",
        "v_BK * (log_w_BK + log_q_TBK.sum(0))",
    ),
    (
        "densities at fixed z from zero states",
        DREG,
        IWAE_SCRIPT,
        "at_fixed_z(training.model, x_TBX, rollout.phi_x, z, state, h.k)",
        "at_fixed_z(training.model, x_TBX, rollout.phi_x, z, training.model.zero_state(len(state[0])), h.k)",
    ),
    (
        "IWAE with one particle",
        IWAE,
        IWAE_SCRIPT,
        "corrections = chosen_corrections(h)",
        "corrections, h.k = chosen_corrections(h), 1",
    ),
    (
        "IWAE of the first of its particles",
        FORMULAS,
        IWAE_SCRIPT,
        "-common.importance_weighted(log_w_BK).mean()",
        "-common.importance_weighted(log_w_BK[:, :1]).mean()",
    ),
    (
        "last-frame resampling dropped",
        RESAMPLED,
        IWAE_SCRIPT,
        "resample_last=True)",
        "resample_last=False)",
    ),
    (
        "last-frame resampling dropped by the filter",
        LAST_FRAME,
        COMMON,
        "math.inf if resample_last and t == len(x_TBX) - 1 else",
        "math.inf if False else",
    ),
    (
        "as published with the right sign",
        PUBLISHED_IWAE,
        IWAE_SCRIPT,
        '-s_BK if "sign" in corrections else s_BK',
        "-s_BK",
    ),
    (
        "as published without its gradient through the weights",
        PUBLISHED_IWAE,
        IWAE_SCRIPT,
        'if "gradient" in corrections:',
        "if True:",
    ),
    (
        "as published without replays",
        PUBLISHED_VAE,
        ALT,
        "particles=samples, replays=replays",
        "particles=samples",
    ),
    (
        "VRNN without its KL",
        VRNN,
        GAUSS,
        "(rollout.nll_TBK + rollout.kl_TBK).mean()",
        "rollout.nll_TBK.mean()",
    ),
    (
        "the importance-weighted bound without log K",
        FORMULAS,
        COMMON,
        "return log_w_BK.logsumexp(dim=1) - math.log(log_w_BK.shape[1])",
        "return log_w_BK.logsumexp(dim=1)",
    ),
    # ---- model ----
    (
        "input and forget gate exchanged",
        PLAIN_MODEL,
        COMMON,
        "candidate, i, forget, o = gate_at[t]\n            candidate.tanh_()",
        "candidate, forget, i, o = gate_at[t]\n            candidate.tanh_()",
    ),
    (
        "a cell that generates with other gates",
        GENERATION,
        COMMON,
        "candidate, i, f, o = gates.chunk(4, dim=-1)",
        "candidate, f, i, o = gates.chunk(4, dim=-1)",
    ),
    (
        "no gradient through the cell to earlier frames",
        PLAIN_MODEL,
        COMMON,
        "            d_c.mul_(forget)\n",
        "            d_c.zero_()\n",
    ),
    (
        "the slope of softplus without its floor",
        PLAIN_MODEL,
        COMMON,
        "-torch.expm1(SIGMA_FLOOR - sigma)",
        "-torch.expm1(-sigma)",
    ),
    (
        "KL by the other variance",
        DENSITIES,
        COMMON,
        "(q_mean - p_mean) / p_sigma",
        "(q_mean - p_mean) / q_sigma",
    ),
    (
        "log q left out of log w",
        PLAIN_MODEL,
        COMMON,
        "log_px + (log_pz - log_qz).view_as(log_px)",
        "log_px + log_pz.view_as(log_px)",
    ),
    (
        "particles that share one state",
        PLAIN_MODEL,
        COMMON,
        "from_h(h_at[t]).view_as(pre_at[t])",
        "from_h(h_at[t]).view_as(pre_at[t])[:, :1].expand_as(pre_at[t])",
    ),
    (
        "sigmas that begin elsewhere",
        INITIAL,
        COMMON,
        "bias.chunk(2)[1].fill_(0.6)",
        "bias.fill_(0.6)",
    ),
    # ---- yardsticks and samples ----
    (
        "the header of FLAC counted",
        FLAC_SIZE,
        COMMON,
        "return 8 * (len(coded) - header), header",
        "return 8 * len(coded), header",
    ),
    (
        "a level that has seen the sample",
        LPC,
        COMMON,
        "        yield squared, v\n        v = torch.lerp(squared, v, memory)\n",
        "        v = torch.lerp(squared, v, memory)\n        yield squared, v\n",
    ),
    (
        "a prediction fitted without its level",
        LPC_FIT,
        COMMON,
        "        weights = 1 / torch.stack(",
        "        torch.stack(",
    ),
    (
        "the entropy of train",
        HISTOGRAM,
        COMMON,
        "in split.read(starts, samples)",
        "in corpus.train.read(starts, samples)",
    ),
    (
        "a resynthesis whose h does not hear x",
        RESYNTHESIS,
        COMMON,
        "self.phi_x(x_t) if heard is None else phi_x[t]",
        "self.phi_x(x_t)",
    ),
    (
        "a resynthesis by the prior",
        RESYNTHESIS,
        COMMON,
        "self.prior(h) if heard is None else",
        "self.prior(h) if True else",
    ),
    (
        "a resynthesis whose filter forgets",
        RESYNTHESIS,
        COMMON,
        "memory = self.likelihood.sample(self.decode(phi_z, h)",
        "_ = self.likelihood.sample(self.decode(phi_z, h)",
    ),
    (
        "a continuation of nothing",
        GOES_ON,
        COMMON,
        "self.zero_state(batch) if state is None else state\n        x, ",
        "self.zero_state(batch)\n        x, ",
    ),
    (
        "a frame whose filter runs backwards",
        DRAWN,
        COMMON,
        "torch.cat((-a.flip(-1), torch",
        "torch.cat((-a, torch",
    ),
    # ---- likelihood of a frame ----
    (
        "a filter off by one lag",
        IMPLIED,
        COMMON,
        "samples[:, self.ar_order - i:-i]",
        "samples[:, self.ar_order - i + 1:1 - i or None]",
    ),
    (
        "a filter that adds its prediction",
        IMPLIED,
        COMMON,
        "a_i, past, value=-1)",
        "a_i, past, value=1)",
    ),
    (
        "a filter that begins anew in each frame",
        IMPLIED,
        COMMON,
        ".view(batch, frames, 1, -1).transpose(0, 1)\n",
        ".view(batch, frames, 1, -1).transpose(0, 1) * (torch.arange(self.x_dim) >= i)\n",
    ),
    (
        "a filter that begins anew in each window",
        WINDOWED,
        COMMON,
        "state=(next_h, next_c, *memory)",
        "state=(next_h, next_c, *map(torch.zeros_like, memory))",
    ),
    (
        "a filter that begins anew in each window of an excerpt",
        LSTM,
        COMMON,
        "before.zero_() if window == 0 else",
        "before.zero_() if window == 0 or before is self.state[-1] else",
    ),
    (
        "memories in another order than the particles",
        PLAIN_LIKELIHOOD,
        COMMON,
        "(samples[:, -self.ar_order:].repeat_interleave(k, dim=0),)",
        "(samples[:, -self.ar_order:].repeat(k, 1),)",
    ),
    (
        "coefficients without tanh",
        STABLE,
        COMMON,
        "step_up(0.9999 * k.tanh())",
        "step_up(0.9999 * k)",
    ),
    (
        "coefficients of the lattice for those of the filter",
        STABLE,
        COMMON,
        "torch.cat((torch.addcmul(a, k_i, a.flip(0), value=-1), k_i))",
        "torch.cat((a, k_i))",
    ),
    (
        "coefficients of a frame for those of the next",
        PLAIN_LIKELIHOOD,
        COMMON,
        "for i, a_i in enumerate(a.split(",
        "for i, a_i in enumerate(a.roll(1, 0).split(",
    ),
    (
        "samples without their filter",
        SAMPLED,
        COMMON,
        "        if self.ar_order:  # drawn",
        "        if False:  # drawn",
    ),
    (
        "generation that forgets the frame before",
        GENERATED,
        COMMON,
        "(torch.cat((recent, x), dim=1)[:, self.x_dim:],)",
        "(torch.zeros_like(recent),)",
    ),
    (
        "a filter at the start",
        UNFILTERED,
        COMMON,
        "        head.weight[2 * self.x_dim:].zero_()\n",
        "",
    ),
    (
        "fixed z without the samples before the window",
        FIXED_Z,
        IWAE_SCRIPT,
        "model.decode(phi_z, h_before), memory, k)",
        "model.decode(phi_z, h_before), [0 * part for part in memory], k)",
    ),
    (
        "one of many equal particles counted alone",
        EXACT,
        COMMON,
        "same * filtering.ess_TB",
        "filtering.ess_TB",
    ),
    # ---- bounds ----
    (
        "log_w_std is a variance",
        BOUNDS,
        COMMON,
        "log_w_BK.std(1, correction=0)",
        "log_w_BK.var(1, correction=0)",
    ),
    (
        "log_w_std is per frame",
        BOUNDS,
        COMMON,
        "log_w_BK.std(1, correction=0)",
        "log_w_BK.std(1, correction=0) / frames",
    ),
    (
        "iwae_k of the first group alone",
        BOUNDS,
        COMMON,
        "log_w_BK[:, :particles // k * k].reshape(-1, k)",
        "log_w_BK[:, :k]",
    ),
    (
        "elbo_K is the analytic elbo",
        BOUNDS,
        COMMON,
        'f"elbo_{particles}": log_w_BK.mean(1)',
        'f"elbo_{particles}": elbo_BK.mean(1)',
    ),
    (
        "effective sample size without its square",
        BOUNDS,
        COMMON,
        "(2 * log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1)).exp()",
        "(log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1) / 2).exp()",
    ),
    (
        "resampling without its random offset",
        FILTER,
        COMMON,
        "+ uniform_B.unsqueeze(1)) / k",
        "+ 0.5) / k",
    ),
    (
        "resampling under a quarter of the particles",
        FILTER,
        COMMON,
        "t == len(x_TBX) - 1 else k / 2",
        "t == len(x_TBX) - 1 else k / 4",
    ),
    (
        "weights that outlive their resampling",
        FILTER,
        COMMON,
        "log_w_BK = torch.where(resampled_B1, 0.0, log_w_BK)",
        "log_w_BK = log_w_BK + 0.0",
    ),
    # ---- evaluation ----
    (
        "raw weights in the monitor",
        MONITOR,
        COMMON,
        "window_bounds(self.averaged, self.corpus, self.corpus.valid",
        "window_bounds(self.model, self.corpus, self.corpus.valid",
    ),
    (
        "raw weights in best.pt",
        BEST,
        COMMON,
        'for name in PARTS}, "model": checkpoint["averaged"]}',
        "for name in PARTS}}",
    ),
    (
        "test split evaluated with the last weights",
        TEST_SPLIT,
        COMMON,
        'load_checkpoint(folder.best, "--resume", self.take_trained)',
        'load_checkpoint(folder.best, "--resume")',
    ),
    (
        "best is worst",
        BEST,
        COMMON,
        'if tracked > progress["best"]:',
        'if tracked < -progress["best"]:',
        COMMON,
        'progress["best"] = tracked\n',
        'progress["best"] = -tracked\n',
    ),
    (
        "best is better than the last",
        BEST,
        COMMON,
        '        if tracked > progress["best"]:\n',
        '        is_better, progress["best"] = tracked > progress["best"], tracked\n        if is_better:\n',
    ),
    (
        "best.pt chosen by the elbo",
        BEST,
        COMMON,
        'line["valid"][f"iwae_{h.eval_k[0]}"]',
        'line["valid"]["elbo"]',
    ),
    (
        "evaluation not dequantised",
        WINDOWS,
        COMMON,
        "normalise(pcm, corpus, torch.rand(pcm.shape, generator=generator, device=generator.device))",
        "normalise(pcm, corpus, 0 * torch.rand(pcm.shape, generator=generator, device=generator.device) + 0.5)",
    ),
    (
        "one evaluation seed for all batches",
        WINDOWS,
        COMMON,
        "manual_seed(EVAL_SEED + index)",
        "manual_seed(EVAL_SEED)",
    ),
    ("standard error divided by n", SUMMARIES, COMMON, "/ len(values) ** 0.5", "/ len(values)"),
    (
        "standard error of a population",
        SUMMARIES,
        COMMON,
        "values.std() /",
        "values.std(correction=0) /",
    ),
    (
        "bits of a sample with the nats of a sequence",
        SUMMARIES,
        COMMON,
        "bits_per_sample(mean / seq_frames, x_dim, corpus.std)",
        "bits_per_sample(mean, x_dim, corpus.std)",
    ),
    (
        "effective sample sizes in windows.csv",
        TABLE,
        COMMON,
        'name.startswith(("kl", *BOUNDS))]',
        'name.startswith(("kl", "ess", *BOUNDS))]',
    ),
    (
        "the filter's bound of the first frame",
        FILTERED_WINDOWS,
        COMMON,
        'f"smc_{smc}": estimate_TB[-1]',
        'f"smc_{smc}": estimate_TB[0]',
    ),
    (
        "standard error over recordings of their means",
        RECORDINGS,
        COMMON,
        "deviations = (of_recordings - mean * frames) / frames.mean()",
        "deviations = of_recordings / frames",
    ),
    (
        "standard error over recordings of a population",
        RECORDINGS,
        COMMON,
        ".std(ddof=1)",
        ".std()",
    ),
    (
        "recordings that count alike, long or short",
        RECORDINGS,
        COMMON,
        "mean = of_recordings.sum() / frames.sum()",
        "mean = (of_recordings / frames).mean()",
    ),
    (
        "other data normalised by its own mean and std",
        OTHER_DATA,
        COMMON,
        'self.corpus.mean, self.corpus.std, self.progress["updates"] = (checkpoint[x] for x in ("mean", "std", "update"))',
        'self.progress["updates"] = checkpoint["update"]',
    ),
    (
        "a subclass of the VRNN judged by the call that it replaces",
        SUBCLASS,
        COMMON,
        "cls.stepper = None",
        "pass",
    ),
    (
        "a layer that is no Linear or ReLU passed over",
        PASSED_OVER,
        COMMON,
        "if type(layer) not in (Linear, Head, nn.ReLU):",
        "if False:",
    ),
    ("a model evaluated in training mode", OF_A_USER, COMMON, ".eval()  # but for buffers", ""),
    (
        "buffers evaluated as they were at first",
        OF_A_USER,
        COMMON,
        ", {id(b): b for b in self.model.buffers()})",
        ")",
    ),
    (
        "the settings of a training overwritten in its evaluation",
        STAYS,
        COMMON,
        "if name not in OF_EVALUATION}",
        'if name in ("script", "name")}',
    ),
    (
        "a checkpoint of another class of model accepted",
        FOREIGN,
        COMMON,
        'if trained.get("model_class", model_class) != model_class:',
        "if False:",
    ),
    # ---- tables ----
    (
        "an interval of a normal distribution",
        INTERVALS,
        PLOT,
        "T_95[min(len(values) - 1, len(T_95)) - 1]",
        "1.96",
    ),
    (
        "an interval with a degree of freedom too many",
        INTERVALS,
        PLOT,
        "len(T_95)) - 1]",
        "len(T_95))]",
    ),
    (
        "runs of different seeds paired",
        INTERVALS,
        PLOT,
        "for seed in sorted(by_seed[0].keys() & by_seed[1])]",
        "for seed in sorted(by_seed[1]) for _ in by_seed[0]]",
    ),
    (
        "differences from a run with another likelihood",
        REFERENCES,
        PLOT,
        '"window", "ar_order")',
        '"window")',
    ),
    (
        "each folder compared with its own first run",
        REFERENCES,
        PLOT,
        "[rows[0] if all(",
        "[runs if all(",
    ),
    ("the limit on a sum as one on the mean", LIMITS, PLOT, '1 / config["batch_size"]', "1"),
    (
        "a number in the text that nobody looks up",
        NUMBERS,
        CHECK,
        "sorted(numbers_in(text) - known)",
        "[]",
    ),
    ("a table that nobody compares", NUMBERS, CHECK, "if made != body:", "if False:"),
    # ---- resume ----
    (
        "the evaluation of a run that goes on kept",
        STALE,
        COMMON,
        "self.eval.unlink(missing_ok=True)",
        "pass",
    ),
    (
        "Adam's moments forgotten on resume",
        RESUME,
        COMMON,
        'tensor.copy_(checkpoint["optimiser"]["state"][i][name])',
        "pass",
    ),
    (
        "random numbers begin anew on resume",
        RESUME,
        COMMON,
        'self.generator.set_state(checkpoint["generator"])',
        "pass",
    ),
    (
        "averaged weights forgotten on resume",
        RESUME,
        COMMON,
        'self.averaged.load_state_dict(checkpoint["averaged"])',
        'self.averaged.load_state_dict(checkpoint["model"])',
    ),
    (
        "the best bound so far forgotten on resume",
        RESTORED,
        COMMON,
        "for name, zero in self.progress.items()}",
        'for name, zero in self.progress.items() if name != "best"}',
    ),
    (
        "states in the middle of an excerpt forgotten on resume",
        RESUME,
        COMMON,
        "            part.copy_(saved[my_part(len(saved))].view_as(part))\n",
        "            pass\n",
    ),
    (
        "a torn log line kept on resume",
        RESUME,
        COMMON,
        '"".join(json.dumps(line) + "\\n" for line in log)',
        '"".join(json.dumps(line) + "\\n" for line in log) + (self.log.read_text() if self.log.exists() else "")[-22:]',
    ),
    (
        "log lines that the checkpoint has not seen kept on resume",
        RESUME,
        COMMON,
        "            if log:\n",
        "            if log and not self.log.exists():\n",
    ),
    ("other data accepted on resume", OTHER_RUN, COMMON, '"data": header["data"]', '"data": 0'),
    # ---- processes ----
    (
        "each process draws the same noise",
        TWO_PROCESSES,
        COMMON,
        "return drawn[:, my_part(rows)]",
        "return drawn[:, :rows // self.processes]",
    ),
    (
        "gradients of processes added up",
        TWO_PROCESSES,
        COMMON,
        "vector_to_parameters(total / self.processes,",
        "vector_to_parameters(total,",
    ),
    (
        "every process reads the first part of the batch",
        TWO_PROCESSES,
        COMMON,
        "(index + 1) * self.batch_size][my_part(self.batch_size)]",
        "(index + 1) * self.batch_size][:self.batch_size // job()[1]]",
    ),
    (
        "the state of the first process alone is saved",
        OTHER_NUMBER,
        COMMON,
        "torch.cat(gather(part.cpu()))",
        "torch.cat([gather(part.cpu())[0]] * self.processes)",
    ),
    # ---- hyperparameters ----
    (
        "the demo overrules what is given",
        DEMO,
        COMMON,
        "{**changed, **given}",
        "{**given, **changed}",
    ),
    (
        "whole numbers cut off",
        REFUSED,
        COMMON,
        "    if not number.is_integer():\n",
        "    if False:\n",
    ),
    (
        "2e4 is no whole number",
        TYPES,
        COMMON,
        "    number = float(text)\n",
        "    number = float(int(text))\n",
    ),
    (
        "numbers without limits",
        REFUSED,
        COMMON,
        "not all(least <= part <= most for part in parts)",
        "False",
    ),
    (
        "help of the class alone, not of those that it extends",
        HELP,
        COMMON,
        "reversed(script.__mro__[:-1])",
        "reversed(script.__mro__[:1])",
    ),
    (
        "a line without a type passed over",
        UNTYPED,
        COMMON,
        "or name in inspect.get_annotations(cls))]",
        "or True)]",
    ),
)


def parts(mutant):
    """(name, test, [(file, text, text in its place), ...])"""
    name, test, *edits = mutant
    return name, f"tests/{test}", list(zip(edits[::3], edits[1::3], edits[2::3], strict=True))


def mutated(edits, source):
    """{file: its text with these edits}. Raises ValueError where a text does not occur exactly once."""
    texts = {}
    for file, text, instead in edits:
        before = texts.setdefault(file, (source / file).read_text())
        if before.count(text) != 1:
            raise ValueError(f"{file} holds {before.count(text)} times: {text!r}")
        texts[file] = before.replace(text, instead)
    return texts


def run_pytest(tree, tests, output):
    """In a process of its own, which has imported PyTorch already: the longest part of most of these tests."""
    import pytest

    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(tree)
    sys.path.remove(str(Path(__file__).parent))
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), *tests]))


def status_of(tree, tests):
    """(exit status of pytest, what it printed); None for tests that do not end."""
    output = tree.with_suffix(".output")
    process = CONTEXT.Process(target=run_pytest, args=(tree, tests, output))
    process.start()
    process.join(600)
    process.kill()
    return process.exitcode, output.read_text()


def outcome(mutant, source, trees):
    """`killed` by its test, `SURVIVED` or, where the test could not even be collected, `ERROR`."""
    name, test, edits = parts(mutant)
    tree, start = trees.get(), time.monotonic()
    texts = mutated(edits, source)
    for file, text in texts.items():
        (tree / file).write_text(text)
    status, output = status_of(tree, [test])
    for file in texts:
        shutil.copy(source / file, tree / file)
    trees.put(tree)
    found = {0: "SURVIVED", 1: "killed", None: "killed"}.get(status, "ERROR")
    print(f"{found:9}{time.monotonic() - start:5.0f} s  {name}", flush=True)
    if found == "ERROR":
        print(output)
    return found


def stale(mutants):
    """Why mutants no longer apply."""
    for name, _, edits in map(parts, mutants):
        try:
            mutated(edits, ROOT)
        except ValueError as why:
            yield f"{name}: {why}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose name holds this word")
    parser.add_argument(
        "--jobs", type=int, default=2, help="copies of the tree that are tested at once"
    )
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant[0]]
    if problems := list(stale(mutants)):
        sys.exit("\n".join(problems))
    os.environ.update(
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1"
    )  # before the server of processes begins
    CONTEXT.set_forkserver_preload(
        ["torch", "torch._dynamo", "h5py", "matplotlib.pyplot", "pytest"]
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        source, *copies = (Path(folder, str(n)) for n in range(1 + options.jobs))
        trees = queue.SimpleQueue()
        for tree in (source, *copies):
            shutil.copytree(
                ROOT,
                tree,
                ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.h5", "__pycache__"),
            )
        for tree in copies:
            trees.put(tree)
        status, output = status_of(copies[0], sorted({test for _, test, _ in map(parts, mutants)}))
        if status:
            sys.exit(f"the tests fail before anything is broken:\n{output}")
        found = list(pool.map(lambda mutant: outcome(mutant, source, trees), mutants))
    alive = [mutant[0] for mutant, what in zip(mutants, found) if what != "killed"]
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants killed", *alive, sep="\n")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
