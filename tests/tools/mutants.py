"""Break the code in one place at a time, and see whether the tests that ought to notice do.

    python tests/tools/mutants.py [--only WORD] [--jobs 2]

A mutant replaces a text in one function by another, in a copy of the tree, and runs the tests named
with it. The text is looked for in what `ast.unparse` makes of the function, without its docstring,
so that neither layout nor comments matter; it must occur there exactly once. Prints a line for each
mutant, and at the end those that no test noticed; exit status 1 if there are any, or if a mutant no
longer applies.
"""

import argparse
import ast
import functools
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


@dataclass
class Mutant:
    what: str  # is wrong
    tests: str  # that must fail, as pytest names them, below tests/
    function: str  # where: a function, Class.method or, if "", what stands outside of both
    old: str
    new: str
    file: str = "common.py"


GAUSS, IWAE_SCRIPT = "vrnn_gauss.py", "vrnn_gauss_iwae.py"
PREPARE, PLOT, CHECK = "prepare_blizzard.py", "plot_recon.py", "tests/experiments/check_readme.py"
OF_2016 = "tests/experiments/published_2016.py"

# ---- the tests -----------------------------------------------------------------------------------

TRAINING = "test_training.py::test_"
LOOP = TRAINING + "the_updates_of_a_script_are_those_of_a_plain_loop"
VRNN, IWAE, DREG = LOOP + "[VRNN]", LOOP + "[IWAE]", LOOP + "[DReG]"
RESAMPLED, LSTM = LOOP + "[resampled]", LOOP + "[LSTM]"
LAST_FRAME = (
    TRAINING + "a_filter_whose_states_are_carried_on_resamples_at_its_last_frame_and_at_no_other"
)
RESUME = TRAINING + "a_run_that_is_stopped_within_an_excerpt_and_resumed_is_the_one_that_was_not"

SCRIPTS = "test_scripts.py::test_"
NOT_FINITE = SCRIPTS + "steps_that_are_not_finite_change_nothing_and_are_counted"
FADING = SCRIPTS + "noise_on_x_fades_to_a_hundredth_and_ends"
RATE = SCRIPTS + "the_learning_rate_falls_to_a_hundredth"
RESTORED = SCRIPTS + "restoring_leaves_a_training_in_place"
STALE = SCRIPTS + "a_run_that_goes_on_has_no_evaluation_of_what_it_was"
OTHER_RUN = SCRIPTS + "other_data_under_the_same_name_is_refused_on_resume"

SCALE = "test_scale.py::test_"
TWO_PROCESSES = SCALE + "two_processes_compute_the_gradient_of_one"
OTHER_NUMBER = SCALE + "a_job_goes_on_with_another_number_of_processes"

MODEL = "test_model.py::test_"
PLAIN_MODEL = MODEL + "rollout_and_gradients_equal_the_plain_implementation[5]"
RECURRENCES = MODEL + "the_fast_recurrence_equals_the_plain_one_with_its_gradients"
NOT_FAST = MODEL + "a_model_with_another_step_or_network_is_not_run_by_the_fast_recurrence"
IN_BF16 = MODEL + "rollout_and_gradients_in_bfloat16_are_those_of_float32_but_for_rounding"
GENERATION = MODEL + "generation_is_the_prior_and_decoder_that_training_scores"
INITIAL = MODEL + "initialisation_scales_with_fan_in_and_keeps_a_signal_at_any_width"
OF_MANY = MODEL + "of_many_latents_those_beyond_the_first_begin_as_the_prior"
OF_ADAPTIVE = MODEL + "under_the_adaptive_likelihood_all_latents_begin_as_the_prior"
MIRRORED = MODEL + "mirrored_layers_start_as_linear_maps_that_keep_x_apart"
COLUMNS = (
    "test_published.py::test_weight_norm_rescales_every_published_column_of_w_and_nothing_else"
)

LIKELIHOOD = "test_likelihood.py::test_"
SURROUNDINGS = "test_surroundings.py::test_"
OWN_SAMPLE = LIKELIHOOD + "no_scale_and_no_filter_hears_its_own_sample_or_a_later_one"
WINDOWED = LIKELIHOOD + "windows_in_sequence_equal_one_long_one"
PLAIN_LIKELIHOOD = LIKELIHOOD + "rollout_and_gradients_equal_the_plain_ones"
DRAWN = LIKELIHOOD + "a_frame_is_drawn_sample_by_sample_from_the_density_that_scores_it"
EXACT = LIKELIHOOD + "without_latent_variables_every_bound_is_the_likelihood"
RESYNTHESIS = LIKELIHOOD + "resynthesis_follows_x_in_h_and_z_and_what_was_drawn_in_the_filter"
GOES_ON = LIKELIHOOD + "what_is_generated_goes_on_from_a_state"

BOUNDS = "test_bounds.py::test_"
DENSITIES = BOUNDS + "analytic_kl_and_densities_equal_torch_distributions"
FORMULAS = BOUNDS + "objectives_equal_their_formulas_written_out"
FILTER = (
    BOUNDS + "the_particle_filter_equals_a_plain_one_and_so_does_the_gradient_along_its_ancestors"
)
WHOLE = BOUNDS + "whole_recordings_count_every_frame_once"
OFFSETS = BOUNDS + "every_sequence_and_frame_is_resampled_with_an_offset_of_its_own"
ALL_PARTS = BOUNDS + "all_parts_of_a_state_go_with_a_particle_that_is_resampled"

EVALUATION = "test_evaluation.py::test_"
BY_HAND = EVALUATION + "bounds_and_spread_of_five_particles_equal_those_computed_by_hand"
SUMMARIES = EVALUATION + "summaries_of_three_windows_equal_those_computed_by_hand"
WINDOWS = EVALUATION + "every_batch_of_windows_is_dequantised_with_noise_of_its_own"
RECORDINGS = EVALUATION + "the_standard_error_over_recordings_is_that_of_a_ratio"
MONITOR = EVALUATION + "the_bounds_in_the_log_are_those_of_the_averaged_weights"
BEST = EVALUATION + "best_pt_holds_the_averaged_weights_of_the_highest_iwae"
TEST_SPLIT = EVALUATION + "the_test_split_is_evaluated_with_the_weights_of_best_pt"
NEGATIVE = EVALUATION + "of_negative_bounds_too_the_highest_is_the_best"
CONTINUED = (
    EVALUATION + "continued_speech_begins_as_real_speech_and_goes_on_from_the_state_after_it"
)
OF_THAT_LENGTH = EVALUATION + "yardsticks_are_those_of_the_data_file_for_windows_of_that_length"
OF_A_USER = EVALUATION + "a_model_is_evaluated_as_such_and_with_its_buffers_as_they_are"
OTHER_DATA = "test_evaluate.py::test_other_data_are_normalised_as_the_training_was"
STAYS = "test_evaluate.py::test_what_belongs_to_the_training_stays_as_the_checkpoint_has_it"
FOREIGN = "test_readme.py::test_a_checkpoint_of_another_model_is_refused"

FLAGS = "test_hyperparameters.py::test_"
DEMO = FLAGS + "the_demo_is_small_and_leaves_what_is_given_as_it_is"
REFUSED = FLAGS + "a_flag_of_another_type_or_name_or_out_of_range_is_refused_in_one_line"
UNTYPED = FLAGS + "a_line_that_cannot_become_a_flag_is_refused_by_name_and_by_its_file"

DATA = "test_data.py::test_"
NEEDIEST = DATA + "a_recording_goes_whole_to_the_split_that_is_furthest_below_its_share_of_samples"
OF_TRAIN = DATA + "statistics_are_those_of_train_alone"
ONE_WRITER = DATA + "two_conversions_cannot_write_the_same_file"
PICKLES = DATA + "an_array_of_arrays_is_refused_but_for_allow_pickle"
CHANNEL = DATA + "the_first_of_two_channels_at_16_khz_is_taken_exactly"
IN_STEP = DATA + "an_mp3_of_varying_rate_is_read_as_in_one_piece"

YARDSTICKS = "test_yardsticks.py::test_"
FLAC_SIZE = YARDSTICKS + "flac_counts_the_audio_of_each_window_and_not_its_header"
LEAST_SQUARES = YARDSTICKS + "the_filter_is_least_squares_over_all_samples_before"
FILTER_BITS = YARDSTICKS + "the_bits_of_the_filter_are_those_of_16_bit_samples_by_what_train_says"
FILTER_LENGTHS = YARDSTICKS + "recordings_of_different_lengths_are_filtered_as_each_alone"
SPREAD = YARDSTICKS + "the_file_holds_the_windows_of_test_and_the_bits_of_each"
WHOLE_FRAMES = YARDSTICKS + "the_file_holds_the_bits_of_whole_recordings_in_whole_frames"

PICTURES = "test_plot.py::test_"
INTERVALS = PICTURES + "intervals_are_those_of_student_and_differences_are_paired_by_seed"
PAIRS = PICTURES + "no_difference_is_formed_on_other_windows_in_another_unit_or_between_seeds"
REFERENCES = (
    PICTURES + "runs_are_compared_with_those_of_the_first_folder_but_for_another_likelihood"
)
NUMBERS = "test_readme.py::test_what_is_not_in_the_logs_is_noticed"

GRAPH = "test_graph.py::test_"
NO_HOST = GRAPH + "an_update_neither_reads_from_the_device_nor_brings_anything_there"
REPLAYS = GRAPH + "a_run_of_replays_is_a_run_of_updates"
PUBLISHED = "test_published_2016.py::test_"
STREAMS = PUBLISHED + "row_streams_w_plus_j_is_window_w_of_stream_j"
IN_ORDER = PUBLISHED + "each_objective_takes_its_rows_in_order_epoch_after_epoch"
BY_ROW = PUBLISHED + "row_i_goes_on_from_row_i_but_in_every_fourth_update"
LIMIT = PUBLISHED + "the_limit_on_the_mean_over_windows"
PLAIN_2016 = PUBLISHED + "updates_equal_those_of_a_plain_loop"
TENTH = PUBLISHED + "a_tenth_of_the_parameters_replaces_a_gradient_that_is_not_finite"
CORRECTIONS = PUBLISHED + "single_corrections_of_the_loss_of_iwae"

# ---- the mutants ---------------------------------------------------------------------------------

MUTANTS = (
    # likelihood
    Mutant(
        "KL by the other variance",
        tests=DENSITIES,
        function="gaussian_kl",
        old="(q_mean - p_mean) / p_sigma",
        new="(q_mean - p_mean) / q_sigma",
    ),
    Mutant(
        "a filter off by one lag",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.log_density",
        old="blocks[..., remembered - self.ar_order:-1].unfold",
        new="blocks[..., remembered - self.ar_order - 1:-2].unfold",
    ),
    Mutant(
        "a scale that hears its own sample",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.log_density",
        old="log_levels(blocks[..., :-1], step_up(k0))",
        new="log_levels(blocks[..., 1:], step_up(k0))",
    ),
    Mutant(
        "memories in another order than the particles",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.log_density",
        old="repeat_interleave(k, dim=0)",
        new="repeat(k, 1)",
    ),
    Mutant(
        "a component for each sample in place of each block",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.log_density",
        old="log_p.logsumexp(3)",
        new="log_p.sum(3)",
    ),
    Mutant(
        "levels that feed themselves",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.corrected",
        old="SUM_OF_EXPONENTS * exponents",
        new="exponents",
    ),
    Mutant(
        "tails that are not learnt",
        tests=PLAIN_LIKELIHOOD,
        function="AdaptiveLikelihood.corrected",
        old="2 + F.softplus(nu)",
        new="4 + 0 * nu",
    ),
    Mutant(
        "noise with other tails than the density",
        tests=LIKELIHOOD + "innovations_are_distributed_as_students",
        function="student",
        old="-2 / nu",
        new="-1 / nu",
    ),
    Mutant(
        "a frame drawn with the base filter of its beginning",
        tests=DRAWN,
        function="AdaptiveLikelihood.sample",
        old="torch.cat((samples, samples.new_tensor(x)), dim=1)",
        new="torch.cat((samples.new_tensor(x), samples), dim=1)",
    ),
    Mutant(
        "levels of a drawn block that follow nothing",
        tests=DRAWN,
        function="AdaptiveLikelihood.sample_block",
        old="powers.append(power_at(len(x) - 1))",
        new="powers.append(powers[-1])",
    ),
    Mutant(
        "a filter's gradient without what its mirror image adds",
        tests=LIKELIHOOD + "the_gradient_of_a_filter_is_that_of_levinsons_recursion",
        function="StepUp.backward",
        old="torch.addcmul(d_others, reflections[i], mirrored)",
        new="d_others",
    ),
    # model
    Mutant(
        "log q left out of log w",
        tests=PLAIN_MODEL,
        function="VRNN.forward",
        old="(log_pz - log_qz)",
        new="log_pz",
    ),
    Mutant(
        "a filter that begins anew in each window",
        tests=WINDOWED,
        function="VRNN.forward",
        old="state=(h, c, *memory)",
        new="state=(h, c, *map(torch.zeros_like, memory))",
    ),
    Mutant(
        "products in float32 in spite of --bf16",
        tests=IN_BF16,
        function="VRNN.forward",
        old="x_TBX.bfloat16() if self.bf16 else x_TBX",
        new="x_TBX",
    ),
    Mutant(
        "a cell that generates with other gates",
        tests=GENERATION,
        function="lstm_cell",
        old="candidate, i, forget, o",
        new="candidate, forget, i, o",
    ),
    Mutant(
        "x of other sequences for the particles at fixed z",
        tests=DREG,
        function="for_particles",
        old="from_x.repeat_interleave(h.shape[-2] // from_x.shape[-2], dim=-2)",
        new="torch.cat([from_x] * (h.shape[-2] // from_x.shape[-2]), dim=-2)",
    ),
    Mutant(
        "sigmas that begin elsewhere",
        tests=INITIAL,
        function="VRNN.initialise",
        old="bias.chunk(2)[1].fill_(0.6)",
        new="bias.fill_(0.6)",
    ),
    Mutant(
        "units that come in pairs of equal weights",
        tests=MIRRORED,
        function="VRNN.mirror",
        old="out_signs = ONE if layer in before_no_relu else PAIR",
        new="out_signs = ONE if layer in before_no_relu else PAIR.abs()",
    ),
    Mutant(
        "active latents that are heard the less, the more others there are",
        tests=OF_MANY,
        function="VRNN.mirror",
        old="phi_z.weight[:, :active] = mirrored(phi_z.out_features, active, PAIR, ONE)",
        new="pass",
    ),
    Mutant(
        "latents that are active under the adaptive likelihood",
        tests=OF_ADAPTIVE,
        function="VRNN.mirror",
        old="active = self.likelihood.active",
        new="active = FrameLikelihood.active",
    ),
    Mutant(
        "weight norm of the recurrent weights too",
        tests=COLUMNS,
        function="VRNN.constrain_weights",
        old=" if name != 'lstm_h'",
        new="",
    ),
    # plain recurrence
    Mutant(
        "a step that a subclass replaces ignored",
        tests=NOT_FAST,
        function="has_fast_recurrence",
        old="getattr(type(model), step)",
        new="getattr(VRNN, step)",
    ),
    Mutant(
        "a layer that is no Linear or ReLU passed over",
        tests=NOT_FAST,
        function="has_fast_recurrence",
        old="if [type(layer) for layer in networks.modules()] != written_out",
        new="if len(networks) != 7",
    ),
    Mutant(
        "a plain recurrence in which c does not follow its ancestor",
        tests=RECURRENCES,
        function="VRNN.recurrence",
        old="c[ancestors[t]]",
        new="c",
    ),
    Mutant(
        "a plain recurrence with the noise of the first frame",
        tests=RECURRENCES,
        function="VRNN.recurrence",
        old="noise[t]",
        new="noise[0]",
    ),
    # fast recurrence
    Mutant(
        "input and forget gate exchanged",
        tests=PLAIN_MODEL,
        function="Recurrence.forward",
        old="candidate, input_, forget, o =",
        new="candidate, forget, input_, o =",
    ),
    Mutant(
        "particles that share one state",
        tests=PLAIN_MODEL,
        function="Recurrence.forward",
        old="from_h(h_at[t]).view_as(acts_t)",
        new="from_h(h_at[t]).view_as(acts_t)[:, :1].expand_as(acts_t)",
    ),
    Mutant(
        "ancestors chosen, and not gone on with",
        tests=FILTER,
        function="Recurrence.forward",
        old="part.copy_(part[ancestors[t]])",
        new="pass",
    ),
    Mutant(
        "only h goes on with an ancestor",
        tests=FILTER,
        function="Recurrence.forward",
        old="(h_at[t + 1], c_at[t + 1])",
        new="(h_at[t + 1],)",
    ),
    Mutant(
        "gradients that do not find the ancestor",
        tests=FILTER,
        function="Recurrence.backward",
        old="d_h_t = torch.zeros_like(d_h_t).index_add_(0, ctx.ancestors[t], d_h_t)",
        new="pass",
    ),
    Mutant(
        "no gradient through the cell to earlier frames",
        tests=PLAIN_MODEL,
        function="Recurrence.backward",
        old="d_c.mul_(forget_at[t])",
        new="d_c.zero_()",
    ),
    Mutant(
        "an output gate whose gradient is that of another gate",
        tests=PLAIN_MODEL,
        function="Recurrence.backward",
        old="torch.mul(tanh_c, o * (1 - o), out=d_o)",
        new="torch.mul(tanh_c, forget * (1 - forget), out=d_o)",
    ),
    Mutant(
        "the slope of softplus without its floor",
        tests=PLAIN_MODEL,
        function="Recurrence.backward",
        old="SIGMA_FLOOR - sigma",
        new="-sigma",
    ),
    Mutant(
        "the gradient of x from one particle alone",
        tests=PLAIN_MODEL,
        function="Recurrence.backward",
        old="acts.shape[2]).sum(2)",
        new="acts.shape[2])[:, :, 0]",
    ),
    # bounds
    Mutant(
        "log_w_std is a variance",
        tests=BY_HAND,
        function="estimate_bounds",
        old="log_w_BK.std(1, correction=0)",
        new="log_w_BK.var(1, correction=0)",
    ),
    Mutant(
        "iwae_k of the first group alone",
        tests=BY_HAND,
        function="estimate_bounds",
        old="log_w_BK[:, :particles // k * k].reshape(-1, k)",
        new="log_w_BK[:, :k]",
    ),
    Mutant(
        "elbo_K is the analytic elbo",
        tests=BY_HAND,
        function="estimate_bounds",
        old="log_w_BK.mean(1)",
        new="(-nll_BK - kl_BK).mean(1)",
    ),
    Mutant(
        "effective sample size without its square",
        tests=BY_HAND,
        function="effective_sample_size",
        old="(2 * log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1))",
        new="(log_w_BK.logsumexp(dim=1) - (2 * log_w_BK).logsumexp(dim=1) / 2)",
    ),
    Mutant(
        "the importance-weighted bound without log K",
        tests=FORMULAS,
        function="importance_weighted",
        old=" - math.log(log_w_BK.shape[1])",
        new="",
    ),
    Mutant(
        "one of many equal particles counted alone",
        tests=EXACT,
        function="estimate_smc",
        old="copies * ess_TB",
        new="ess_TB",
    ),
    Mutant(
        "offsets of the resampling shared by all sequences",
        tests=OFFSETS,
        function="estimate_smc",
        old="torch.rand, generator, frames, batch)",
        new="torch.rand, generator, frames, 1).expand(-1, batch)",
    ),
    # particle filter
    Mutant(
        "a filter that ignores its incoming state",
        tests=FILTER,
        function="particle_filter",
        old="x_TBX[t:t + 1], state,",
        new="x_TBX[t:t + 1], state if t else None,",
    ),
    Mutant(
        "ancestors of the first sequence for all",
        tests=FILTER,
        function="particle_filter",
        old="own_BK[:, :1]",
        new="own_BK[:1, :1]",
    ),
    Mutant(
        "a part of the state that resampling does not take along",
        tests=ALL_PARTS,
        function="particle_filter",
        old="part[ancestors] for part",
        new="part if part is rollout.state[1] else part[ancestors] for part",
    ),
    Mutant(
        "resampling under a quarter of the particles",
        tests=FILTER,
        function="particle_filter",
        old="k / 2",
        new="k / 4",
    ),
    Mutant(
        "weights that outlive their resampling",
        tests=FILTER,
        function="particle_filter",
        old="torch.where(resampled_B.unsqueeze(1), 0.0, log_w_BK)",
        new="log_w_BK",
    ),
    Mutant(
        "resampling at every frame where it is asked for at the last",
        tests=LAST_FRAME,
        function="particle_filter",
        old="resample_last and t == len(x_TBX) - 1",
        new="resample_last",
    ),
    Mutant(
        "resampling without its random offset",
        tests=FILTER,
        function="systematic",
        old="uniform_B.unsqueeze(1)",
        new="0.5",
    ),
    # objectives
    Mutant(
        "VRNN without its KL",
        tests=VRNN,
        file=GAUSS,
        function="objective",
        old="rollout.nll_TBK + rollout.kl_TBK",
        new="rollout.nll_TBK",
    ),
    Mutant(
        "IWAE of the first of its particles",
        tests=FORMULAS,
        file=IWAE_SCRIPT,
        function="objective",
        old="importance_weighted(log_w_BK)",
        new="importance_weighted(log_w_BK[:, :1])",
    ),
    Mutant(
        "--dreg runs the plain objective",
        tests=DREG,
        file=IWAE_SCRIPT,
        function="main",
        old="if h.dreg:",
        new="if False:",
    ),
    Mutant(
        "densities at fixed z from zero states",
        tests=DREG,
        file=IWAE_SCRIPT,
        function="main",
        old="rollout.phi_x, z, training.state, h.k",
        new="rollout.phi_x, z, [0 * part for part in training.state], h.k",
    ),
    Mutant(
        "DReG with weights that are not squared",
        tests=DREG,
        file=IWAE_SCRIPT,
        function="objective_dreg",
        old="v_BK ** 2 * (log_w_BK",
        new="v_BK * (log_w_BK",
    ),
    Mutant(
        "the state of the particle filter is not carried on",
        tests=RESAMPLED,
        file=IWAE_SCRIPT,
        function="main",
        old="training.state, noise, h.k, filtering.ancestors",
        new="None, noise, h.k, filtering.ancestors",
    ),
    Mutant(
        "states carried on without a last resampling",
        tests=RESAMPLED,
        file=IWAE_SCRIPT,
        function="main",
        old="resample_last=True",
        new="resample_last=False",
    ),
    Mutant(
        "the frame of a resampling counted after it",
        tests=FILTER,
        file=IWAE_SCRIPT,
        function="objective_resampled",
        old="resampled_TB.cumsum(0) - resampled_TB.long()",
        new="resampled_TB.cumsum(0)",
    ),
    # carried states and excerpts
    Mutant(
        "no carry of state between windows",
        tests=VRNN,
        function="Training.next_window",
        old="before.copy_(after)",
        new="before.zero_()",
    ),
    Mutant(
        "carry of state across excerpts",
        tests=VRNN,
        function="Training.next_window",
        old="if window == 0:",
        new="if self.made == 0:",
    ),
    Mutant(
        "the batch after the one that was asked for",
        tests=VRNN,
        function="Training.next_window",
        old="self.read_ahead[batch].result()",
        new="self.read_ahead[batch + 1].result()",
    ),
    Mutant(
        "the same order in every epoch",
        tests=VRNN,
        function="Excerpts.starts_of",
        old="(self.seed, epoch)",
        new="(self.seed, 0)",
    ),
    Mutant(
        "excerpts that begin at the beginning of a recording",
        tests=VRNN,
        function="Excerpts.starts_of",
        old=" + np.repeat(shift, self.counts)",
        new="",
    ),
    Mutant(
        "an excerpt over the end of its recording",
        tests=VRNN,
        function="Excerpts.starts_of",
        old="np.repeat(shift, self.counts)",
        new="np.repeat(shift + 1, self.counts)",
    ),
    Mutant(
        "held-out windows that overlap",
        tests=WINDOWS,
        function="piece_starts",
        old="(chosen - first) * samples",
        new="(chosen - first) * (samples // 2)",
    ),
    Mutant(
        "the first of many windows in place of a spread",
        tests=SPREAD,
        function="evenly_spread",
        old="items[np.linspace(0, len(items) - 1, at_most).round().astype(int)]",
        new="items[:at_most]",
    ),
    # step
    Mutant(
        "grad_clip ten times too large",
        tests=VRNN,
        function="Training.create_state",
        old="h.grad_clip or math.inf",
        new="10 * h.grad_clip or math.inf",
    ),
    Mutant(
        "weight norm never applied",
        tests=VRNN,
        function="Training.step",
        old="self.model.constrain_weights(self.h.weight_norm)",
        new="pass",
    ),
    Mutant(
        "a gradient that is not finite moves the state",
        tests=NOT_FINITE,
        function="Training.step",
        old="torch.where(is_finite, part, 0.0)",
        new="part",
    ),
    Mutant(
        "a gradient that is not finite moves the parameters",
        tests=NOT_FINITE,
        function="Training.step_adam",
        old="self.optimiser.found_inf = (~is_finite).float()",
        new="pass",
    ),
    Mutant(
        "the gradients of updates add up",
        tests=VRNN,
        function="Training.step_adam",
        old="self.optimiser.zero_grad()",
        new="pass",
    ),
    Mutant(
        "a learning rate that falls to nothing",
        tests=RATE,
        function="Training.step_adam",
        old="clamp(min=0.01)",
        new="clamp(min=0.0)",
    ),
    Mutant(
        "weights that are not averaged",
        tests=VRNN,
        function="Training.step",
        old="self.average_weights()",
        new="pass",
    ),
    Mutant(
        "mirror() never called",
        tests=VRNN,
        function="Training.create_model",
        old="model.mirror()",
        new="pass",
    ),
    Mutant(
        "the mean loss of all updates so far",
        tests=VRNN,
        function="Training.monitor",
        old="counts['loss_sum'].zero_()\n    counts['losses'].zero_()",
        new="pass",
    ),
    # noise in training
    Mutant(
        "no dequantisation in training",
        tests=VRNN,
        function="Training.window",
        old="normalise(self.pcm, self.corpus, uniform)",
        new="normalise(self.pcm, self.corpus)",
    ),
    Mutant(
        "x_noise on the target alone",
        tests=VRNN,
        function="Training.window",
        old="if h.x_noise:",
        new="if h.x_noise:\n"
        "        self.model.phi_x.register_forward_pre_hook(lambda *_, x=x_TBX: x)",
    ),
    Mutant(
        "x_noise that never ends",
        tests=FADING,
        function="Training.window",
        old="done < 1",
        new="done < 99",
    ),
    # best checkpoint
    Mutant(
        "raw weights in the monitor",
        tests=MONITOR,
        function="Training.monitor",
        old="window_bounds(self.averaged,",
        new="window_bounds(self.model,",
    ),
    Mutant(
        "raw weights in best.pt",
        tests=BEST,
        function="Training.monitor",
        old=" | dict(model=checkpoint['averaged'])",
        new="",
    ),
    Mutant(
        "best is worst where bounds are negative",
        tests=NEGATIVE,
        function="Training.monitor",
        old="chosen_by > self.best\n    self.best = max(self.best, chosen_by)",
        new="abs(chosen_by) > self.best\n    self.best = max(self.best, abs(chosen_by))",
    ),
    Mutant(
        "no best.pt where bounds are negative",
        tests=NEGATIVE,
        function="Training.create_state",
        old="self.best = -math.inf",
        new="self.best = 0.0",
    ),
    Mutant(
        "best is better than the last",
        tests=BEST,
        function="Training.monitor",
        old="max(self.best, chosen_by)",
        new="chosen_by",
    ),
    Mutant(
        "best.pt chosen by the elbo",
        tests=BEST,
        function="monitored_bound",
        old="f'iwae_{eval_k[0]}'",
        new="'elbo'",
    ),
    Mutant(
        "test split evaluated with the last weights",
        tests=TEST_SPLIT,
        function="Training.finish",
        old="load_parameters(self.averaged, checkpoint, best, '--resume')",
        new="pass",
    ),
    Mutant(
        "a model evaluated in training mode",
        tests=OF_A_USER,
        function="Training.create_model",
        old=".eval()",
        new="",
    ),
    Mutant(
        "buffers evaluated as they were at first",
        tests=OF_A_USER,
        function="Training.create_model",
        old="memo=buffers",
        new="memo={}",
    ),
    # evaluation
    Mutant(
        "evaluation not dequantised",
        tests=WINDOWS,
        function="frames_at",
        old="torch.rand(",
        new="0.5 + 0 * torch.rand(",
    ),
    Mutant(
        "one evaluation seed for all batches",
        tests=WINDOWS,
        function="window_bounds",
        old="EVAL_SEED + index",
        new="EVAL_SEED",
    ),
    Mutant(
        "standard error divided by n",
        tests=SUMMARIES,
        function="summarise",
        old="len(values) ** 0.5",
        new="len(values)",
    ),
    Mutant(
        "bits of a sample with the nats of a sequence",
        tests=SUMMARIES,
        function="summarise",
        old="bits_per_sample(mean / seq_frames,",
        new="bits_per_sample(mean,",
    ),
    Mutant(
        "standard error over recordings of their means",
        tests=RECORDINGS,
        function="evaluate_recordings",
        old="(nats - mean * frames) / frames.mean()",
        new="nats / frames",
    ),
    Mutant(
        "standard error over recordings of a population",
        tests=RECORDINGS,
        function="evaluate_recordings",
        old="ddof=1",
        new="ddof=0",
    ),
    Mutant(
        "recordings that count alike, long or short",
        tests=RECORDINGS,
        function="evaluate_recordings",
        old="sum(nats) / frames.sum()",
        new="(nats / frames).mean()",
    ),
    Mutant(
        "what is padded to a recording counted with it",
        tests=RECORDINGS,
        function="evaluate_recordings",
        old="estimate_TB[lengths[i] - 1, b]",
        new="estimate_TB[-1, b]",
    ),
    Mutant(
        "what is left of a frame counted as one",
        tests=RECORDINGS,
        function="evaluate_recordings",
        old="np.diff(split.offsets) // model.x_dim",
        new="-(-np.diff(split.offsets) // model.x_dim)",
    ),
    Mutant(
        "FLAC of other recordings",
        tests=WHOLE,
        function="evaluate_recordings",
        old="bits[i] for i in chosen",
        new="bits[i] for i in sorted(bits)[-len(chosen):]",
    ),
    Mutant(
        "other data normalised by their own mean and std",
        tests=OTHER_DATA,
        function="evaluate",
        old="corpus.mean, corpus.std =",
        new="_ =",
    ),
    Mutant(
        "the settings of a training overwritten in its evaluation",
        tests=STAYS,
        function="evaluate_checkpoint",
        old="if name in OF_EVALUATION",
        new="",
    ),
    Mutant(
        "a checkpoint of another class of model accepted",
        tests=FOREIGN,
        function="load_parameters",
        old="checkpoint['config'].get('model_class', name) != name",
        new="False",
    ),
    Mutant(
        "the yardsticks of windows of another length",
        tests=OF_THAT_LENGTH,
        function="evaluate",
        old="corpus.yardsticks.get(h.seq_frames * model.x_dim, {})",
        new="{'flac': 1.0}",
    ),
    # speech
    Mutant(
        "a resynthesis whose h does not hear x",
        tests=RESYNTHESIS,
        function="VRNN.generate",
        old="if resynthesised is None:",
        new="if True:",
    ),
    Mutant(
        "a resynthesis by the prior",
        tests=RESYNTHESIS,
        function="VRNN.generate",
        old="if resynthesised is None else",
        new="if True else",
    ),
    Mutant(
        "a continuation of nothing",
        tests=GOES_ON,
        function="VRNN.generate",
        old="if state is None else",
        new="if True else",
    ),
    Mutant(
        "continued speech from a zero state",
        tests=CONTINUED,
        function="write_samples",
        old="generator, after)",
        new="generator)",
    ),
    # resuming
    Mutant(
        "the evaluation of a run that goes on kept",
        tests=STALE,
        function="claim_folder",
        old="(folder / EVAL).unlink(missing_ok=True)",
        new="pass",
    ),
    Mutant(
        "log lines that the checkpoint has not seen kept",
        tests=RESUME,
        function="claim_folder",
        old="if log:",
        new="if log and (not (folder / LOG).exists()):",
    ),
    Mutant(
        "Adam's moments forgotten on resume",
        tests=RESUME,
        function="Training.restore",
        old="tensor.copy_(checkpoint['optimiser']['state'][i][name])",
        new="pass",
    ),
    Mutant(
        "random numbers begin anew on resume",
        tests=RESUME,
        function="Training.restore",
        old="self.generator.set_state(checkpoint['generator'])",
        new="pass",
    ),
    Mutant(
        "states in the middle of an excerpt forgotten on resume",
        tests=RESUME,
        function="Training.restore",
        old="part.copy_(saved[my_part(len(saved))].view_as(part))",
        new="pass",
    ),
    Mutant(
        "the best bound so far forgotten on resume",
        tests=RESTORED,
        function="Training.restore",
        old="self.best = checkpoint['best']",
        new="pass",
    ),
    Mutant(
        "other data accepted on resume",
        tests=OTHER_RUN,
        function="refuse_changes",
        old="header['data']",
        new="0",
    ),
    # processes
    Mutant(
        "each process draws the same noise",
        tests=TWO_PROCESSES,
        function="Training.draw",
        old="my_part(rows)",
        new=":rows // self.processes",
    ),
    Mutant(
        "gradients of processes added up",
        tests=TWO_PROCESSES,
        function="average_over_processes",
        old="total / job()[1]",
        new="total",
    ),
    Mutant(
        "every process reads the first part of the batch",
        tests=TWO_PROCESSES,
        function="Excerpts.batch",
        old="my_part(self.batch_size)",
        new=":self.batch_size // job()[1]",
    ),
    Mutant(
        "the state of the first process alone is saved",
        tests=OTHER_NUMBER,
        function="Training.checkpoint",
        old="torch.cat(gather(part.cpu()))",
        new="torch.cat([gather(part.cpu())[0]] * self.processes)",
    ),
    # flags
    Mutant(
        "the demo overrules what is given",
        tests=DEMO,
        function="parse",
        old="h = parse_flags(flags(**defaults), argv)",
        new="h = dataclasses.replace(h, **defaults)",
    ),
    Mutant(
        "numbers without a lower limit",
        tests=REFUSED,
        function="refuse_out_of_range",
        old="least <= n",
        new="-math.inf < n",
    ),
    Mutant(
        "a line without a type passed over",
        tests=UNTYPED,
        function="refuse_untyped",
        old="for cls in script.__mro__[:-1]:",
        new="for cls in ():",
    ),
    # conversion
    Mutant(
        "a recording to the split that has most",
        tests=NEEDIEST,
        function="write_recordings",
        old="max(writers,",
        new="min(writers,",
    ),
    Mutant(
        "mean and standard deviation of the test split",
        tests=OF_TRAIN,
        function="convert",
        old="(mean, std), *_ =",
        new="*_, (mean, std) =",
    ),
    Mutant(
        "half a recording stays",
        tests=NEEDIEST,
        function="SplitWriter.close",
        old="self.audio.resize((samples,))",
        new="pass",
    ),
    Mutant(
        "two conversions into one file",
        tests=ONE_WRITER,
        function="lock",
        old="fcntl.LOCK_EX | fcntl.LOCK_NB",
        new="fcntl.LOCK_SH",
    ),
    Mutant(
        "arrays of arrays read in any case",
        tests=PICKLES,
        function="only_array",
        old="allow_pickle=allow_pickle",
        new="allow_pickle=True",
    ),
    Mutant(
        "the last of two channels",
        tests=CHANNEL,
        file=PREPARE,
        function="first_channel",
        old="channels[:, 0]",
        new="channels[:, -1]",
    ),
    Mutant(
        "an .mp3 read on after a seek",
        tests=IN_STEP,
        file=PREPARE,
        function="sound_file_blocks",
        old="file.seekable = lambda: False",
        new="pass",
    ),
    # yardsticks
    Mutant(
        "the header of FLAC counted",
        tests=FLAC_SIZE,
        file=PREPARE,
        function="frame_bits",
        old="(len(coded) - first_frame)",
        new="len(coded)",
    ),
    Mutant(
        "what is left of a frame in the FLAC of a recording",
        tests=WHOLE_FRAMES,
        file=PREPARE,
        function="recording_yardsticks",
        old=" // FRAME * FRAME",
        new="",
    ),
    Mutant(
        "FLAC in frames of 4,096 samples",
        tests=WHOLE_FRAMES,
        file=PREPARE,
        function="flac_bits",
        old="(samples[n:n + 1024]) for n in range(0, len(samples), 1024)",
        new="(samples[n:n + 4096]) for n in range(0, len(samples), 4096)",
    ),
    Mutant(
        "a filter that weighs loud samples more than quiet ones",
        tests=LEAST_SQUARES,
        file=PREPARE,
        function="filtered",
        old="square[:, 0].sqrt() + ",
        new="1 + ",
    ),
    Mutant(
        "a scale that has seen the sample",
        tests=LEAST_SQUARES,
        file=PREPARE,
        function="filtered",
        old="squares.append(square)",
        new="squares.append(torch.lerp(error.square().unsqueeze(1), square, kept))",
    ),
    Mutant(
        "a filter fitted on what it predicts",
        tests=FILTER_BITS,
        file=PREPARE,
        function="fitted_filter",
        old="windows_at(corpus.train, starts)",
        new="windows_at(corpus.test, window_starts(corpus.test, FITTED_WINDOWS))",
    ),
    Mutant(
        "what repeats a short recording counted",
        tests=FILTER_LENGTHS,
        file=PREPARE,
        function="filter_bits",
        old=" * counted",
        new="",
    ),
    Mutant(
        "bits of normalised samples",
        tests=FILTER_BITS,
        file=PREPARE,
        function="filter_bits",
        old="lengths * math.log(corpus.std) - nats",
        new="-nats",
    ),
    # the CUDA graph
    Mutant(
        "an update that reads the device",
        tests=NO_HOST,
        function="Training.step",
        old="self.step_adam(is_finite)",
        new="if is_finite.item():\n        self.step_adam(is_finite)",
    ),
    Mutant(
        "a tensor of the host in an update",
        tests=NO_HOST,
        function="Training.step_adam",
        old="(~is_finite).float()",
        new="torch.tensor(0.0)",
    ),
    Mutant(
        "a window of the host in the likelihood",
        tests=NO_HOST,
        function="AdaptiveLikelihood.base_filter",
        old="torch.arange(heard, device=samples.device, dtype=torch.float64)",
        new="torch.arange(heard, dtype=torch.float64)",
    ),
    Mutant(
        "numbers of the default generator",
        tests=REPLAYS,
        function="Training.draw",
        old="generator=self.generator, ",
        new="",
    ),
    Mutant(
        "a state that is replaced, not copied",
        tests=REPLAYS,
        function="Training.step",
        old="carried.copy_(torch.where(is_finite, part, 0.0))",
        new="carried.set_(torch.where(is_finite, part, 0.0))",
    ),
    Mutant(
        "a learning rate that a graph repeats",
        tests=REPLAYS,
        function="Training.step_adam",
        old="self.counts['made'] / h.lr_updates",
        new="torch.tensor(self.made / h.lr_updates)",
    ),
    Mutant(
        "a noise that a graph repeats",
        tests=REPLAYS,
        function="Training.window",
        old="self.counts['made'] / h.x_noise_updates",
        new="torch.tensor(self.made / h.x_noise_updates)",
    ),
    Mutant(
        "an average whose share a graph repeats",
        tests=REPLAYS,
        function="Training.average_weights",
        old="made = self.counts['made']",
        new="made = torch.tensor(self.made)",
    ),
    Mutant(
        "a generator that the graph does not know",
        tests=REPLAYS,
        function="Training.capture",
        old="graph.register_generator_state(self.generator)",
        new="pass",
    ),
    Mutant(
        "moments that capture leaves moved",
        tests=REPLAYS,
        function="Training.restore",
        old="tensor.copy_(checkpoint['optimiser']['state'][i][name])",
        new="pass",
    ),
    Mutant(
        "averages that capture leaves moved",
        tests=REPLAYS,
        function="Training.restore",
        old="self.averaged.load_state_dict(checkpoint['averaged'])",
        new="pass",
    ),
    Mutant(
        "counts that capture leaves moved",
        tests=REPLAYS,
        function="Training.restore",
        old="count.copy_(checkpoint['counts'][name])",
        new="pass",
    ),
    # tables
    Mutant(
        "an interval with a degree of freedom too many",
        tests=INTERVALS,
        file=PLOT,
        function="t_95",
        old="T_95[degrees - 1]",
        new="T_95[degrees]",
    ),
    Mutant(
        "runs paired by their position",
        tests=PAIRS,
        file=PLOT,
        function="by_seed",
        old="run.seed: run for run in runs",
        new="n: run for n, run in enumerate(runs)",
    ),
    Mutant(
        "differences from a run with another likelihood",
        tests=REFERENCES,
        file=PLOT,
        function="references",
        old=", 'ar_order'",
        new="",
    ),
    Mutant(
        "each folder compared with its own first run",
        tests=REFERENCES,
        file=PLOT,
        function="references",
        old="if differing(",
        new="if True or differing(",
    ),
    Mutant(
        "a number in the text that nobody looks up",
        tests=NUMBERS,
        file=CHECK,
        function="problems",
        old="in_prose - known",
        new="set()",
    ),
    Mutant(
        "a table that nobody compares",
        tests=NUMBERS,
        file=CHECK,
        function="problems",
        old="elif lines != body:",
        new="elif False:",
    ),
    # surroundings
    Mutant(
        "an output that fails ends the run",
        tests=SURROUNDINGS + "a_closed_pipe_behind_the_output_ends_no_run",
        function="Unfailing.attempt",
        old="except OSError:",
        new="except KeyError:",
    ),
    Mutant(
        "SIGHUP taken under nohup",
        tests=SURROUNDINGS + "a_signal_that_is_ignored_stays_ignored",
        function="stop_requests",
        old="signal.getsignal(number) != signal.SIG_IGN",
        new="True",
    ),
    Mutant(
        "data read with a lock",
        tests=SURROUNDINGS + "data_are_read_without_a_lock",
        function="open_hdf5",
        old="locking=False",
        new="locking=True",
    ),
    Mutant(
        "what is learnt lost with the data",
        tests=SURROUNDINGS + "an_input_error_in_training_is_named_and_keeps_what_is_learnt",
        function="Training.updates",
        old="if self.processes == 1:",
        new="if self.processes == 0:",
    ),
    Mutant(
        "arrays after the first lost",
        tests=SURROUNDINGS + "arrays_after_the_first_in_one_file_are_not_lost_in_silence",
        function="refuse_surplus",
        old="if count:",
        new="if False:",
    ),
    # pipeline of 2016
    Mutant(
        "2016: the windows of a stream in one update",
        tests=STREAMS,
        file=OF_2016,
        function="rows_of",
        old="number, stream = np.divmod(np.arange(length // samples * count), count)",
        new="stream, number = np.divmod(np.arange(length // samples * count), length // samples)",
    ),
    Mutant(
        "2016: no replays",
        tests=IN_ORDER,
        file=OF_2016,
        function="Run.update",
        old="self.source.batch(progress['updates'] // h.replays)",
        new="self.source.batch(progress['updates'])",
    ),
    Mutant(
        "2016: the state of a stream, not of a row",
        tests=BY_ROW,
        file=OF_2016,
        function="Run.update",
        old="if h.carried == 'by_row':",
        new="if False:",
    ),
    Mutant(
        "2016: a state that is never zero again",
        tests=BY_ROW,
        file=OF_2016,
        function="Run.state_in",
        old="ages % self.h.reset_freq != 0",
        new="ages != 0",
    ),
    Mutant(
        "2016: a limit on the loss, not on the mean",
        tests=LIMIT,
        file=OF_2016,
        function="as_in_2016",
        old=" / loss_scale(h)",
        new="",
    ),
    Mutant(
        "2016: a gradient that is not divided by the rows",
        tests=PLAIN_2016,
        file=OF_2016,
        function="clip",
        old="p.grad.div_(rows)",
        new="p.grad",
    ),
    Mutant(
        "2016: a gradient that is not finite left out",
        tests=TENTH,
        file=OF_2016,
        function="clip",
        old="p.grad.copy_(0.1 * p)",
        new="p.grad.zero_()",
    ),
    Mutant(
        "2016: weights by the sum over time",
        tests=CORRECTIONS,
        file=OF_2016,
        function="iwae_loss",
        old="if over_time == 'sum':",
        new="if True:",
    ),
)

# ---- applying them -------------------------------------------------------------------------------


def mutated(mutant, root):
    """The text of the mutant's file. Raises ValueError or SyntaxError."""
    source = (root / mutant.file).read_text()
    places = statements_of(without_docstrings(source), mutant.function)
    counts = [ast.unparse(place).count(mutant.old) for place in places]
    if sum(counts) != 1:
        raise ValueError(f"{mutant.old!r} occurs {sum(counts)} times")
    place = places[counts.index(1)]
    text = ast.unparse(place).replace(mutant.old, mutant.new)
    ast.parse(text)  # SyntaxError where it is no Python any more
    decorators = getattr(place, "decorator_list", [])
    first = min(node.lineno for node in (place, *decorators))
    lines = source.splitlines()
    lines[first - 1 : place.end_lineno] = [textwrap.indent(text, " " * place.col_offset)]
    return "\n".join(lines) + "\n"


@functools.cache
def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) and len(node.body) > 1:
            del node.body[0]
    return tree


def statements_of(tree, function):
    """The one of that name, or all that define neither function nor class."""
    if not function:
        return [node for node in tree.body if not isinstance(node, DEFINITIONS)]
    place = tree
    for name in function.split("."):
        found = [node for node in place.body if getattr(node, "name", None) == name]
        if len(found) != 1:
            raise ValueError(f"{name} is defined {len(found)} times")
        place = found[0]
    return [place]


def stale(mutants):
    """Why mutants no longer apply."""
    for mutant in mutants:
        try:
            mutated(mutant, ROOT)
        except (ValueError, SyntaxError) as why:
            yield f"{mutant.what}: {mutant.file}, {mutant.function or 'at the top'}: {why}"


# ---- running the tests ---------------------------------------------------------------------------


def run_pytest(tree, tests, output):
    """In a process of its own, which has imported PyTorch: the longest part of most tests."""
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
    paths = [f"tests/{test}" for test in tests]
    process = CONTEXT.Process(target=run_pytest, args=(tree, paths, output))
    process.start()
    process.join(600)
    process.kill()
    return process.exitcode, output.read_text()


def outcome(mutant, source, trees):
    """`killed` by its tests, `SURVIVED` or, where they could not even be collected, `ERROR`."""
    tree = trees.get()
    started = time.monotonic()
    (tree / mutant.file).write_text(mutated(mutant, source))
    status, output = status_of(tree, [mutant.tests])
    shutil.copy(source / mutant.file, tree / mutant.file)
    trees.put(tree)
    found = {0: "SURVIVED", 1: "killed", None: "killed"}.get(status, "ERROR")
    print(f"{found:9}{time.monotonic() - started:5.0f} s  {mutant.what}", flush=True)
    if found == "ERROR":
        print(output)
    return found


def copies_of_the_tree(folder, count):
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*.h5", "__pycache__")
    for n in range(count):
        yield shutil.copytree(ROOT, Path(folder, str(n)), ignore=ignored)


def outcomes_of(mutants, jobs):
    """The outcome of each mutant. Ends where the tests fail before anything is broken."""
    # set before the server of processes begins
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    modules = ["torch", "torch._dynamo", "h5py", "matplotlib.pyplot", "pytest", "soundfile", "tyro"]
    CONTEXT.set_forkserver_preload(modules)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        source, *copies = copies_of_the_tree(folder, 1 + jobs)
        tests = sorted({mutant.tests for mutant in mutants})
        status, output = status_of(copies[0], tests)
        if status:
            sys.exit(f"the tests fail before anything is broken:\n{output}")
        trees = queue.SimpleQueue()
        for tree in copies:
            trees.put(tree)
        return list(pool.map(lambda mutant: outcome(mutant, source, trees), mutants))


def main(mutants=MUTANTS):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants of which the description holds this")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree tested at once")
    options = parser.parse_args()
    mutants = [mutant for mutant in mutants if options.only in mutant.what]
    if problems := list(stale(mutants)):
        sys.exit("\n".join(problems))
    found = outcomes_of(mutants, options.jobs)
    alive = [mutant.what for mutant, what in zip(mutants, found) if what != "killed"]
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants killed", *alive, sep="\n")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
