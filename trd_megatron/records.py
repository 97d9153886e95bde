"""The pyarrow schemas that stages exchange. One row of `PROBLEM` is a problem, one row of `TRAJECTORY` an attempt at it."""

import pyarrow as pa

PROBLEM = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),  # math | code | lab
        pa.field("problem", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("answer_type", pa.string()),
        pa.field("check_values", pa.string()),  # JSON
        pa.field("reference_solution", pa.string()),
        pa.field("starter_code", pa.string()),
        pa.field("tests", pa.string()),  # JSON
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train | test
    ]
)

TRAJECTORY = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length | abort
        pa.field("abort_reason", pa.string()),  # one line, where finish_reason is abort
        pa.field("passed", pa.bool_()),  # null: not graded
        pa.field("verdict", pa.string()),  # pass | fail | no_answer | timeout | error
        pa.field("extracted_answer", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("weight_version", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)

REFINED = TRAJECTORY.append(pa.field("initial_response", pa.string(), nullable=False)).append(pa.field("initial_passed", pa.bool_()))

SAMPLE = pa.schema(  # train/samples.parquet: what the learner's ranks read; one row is one trajectory under both prompts
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("student_prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("teacher_prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("rollout_passed", pa.bool_()),
        pa.field("source", pa.string()),  # of supervised training: what kind of example it is
    ]
)

SCORE = pa.schema(  # scores.parquet: what the learner's ranks give back, a row per sample in the order of samples.parquet
    [
        pa.field("logprobs", pa.list_(pa.float64()), nullable=False),  # of the response ids
        pa.field("top_ids", pa.list_(pa.int32()), nullable=False),  # the likeliest id in the place of each
    ]
)
