"""Limits: the constants that planning and running share. Imports nothing; no torch."""

# The model
MAX_DRAFTS = 3  # draft heads of a checkpoint: tokens that can be drafted at a time

# A prompt
PREFILL_CHUNK = (
    1024  # tokens that go through a layer at a time: fixed, so that a budget never changes an answer
)
MAX_SEGMENT_TOKENS = (
    16_384  # tokens that go through the model layer by layer, so that each expert is read once
)
SEGMENT_SHARE = 1 / 16  # of what is left of the budget: for the activations of longer segments
EXPERT_ROWS = 2048  # rows of a prompt that experts work on at a time
SHARED_TOKENS = 256  # of a prompt, up to which GPU and CPU share the experts; beyond, all pages go to the GPU
STAGES = 4  # pages on their way through the GPU

# A sequence
DEFAULT_CONTEXT = 32_768
MAX_BATCH = 64  # sequences that `generate` advances together
N_SNAPSHOTS = 4  # positions of a conversation that can be returned to
SLACK = 16  # tokens that a window layer can be taken back without a snapshot

# A decode step
STEP_TOKENS = 16  # the most tokens that are served page by page; more are a prompt
TAIL_TOKENS = 16  # of a prompt, whose routing enters the statistics

# Where an expert's page can be found, the fastest first
TIERS = ("gpu", "ram", "disk")

# Memory
N_READERS = 4  # reads in flight; a SATA disk is busy with one, an NVMe drive with four reads of megabytes
ATTENTION_WORKSPACE_BYTES = 8 << 20  # attention logits at a time
LINEAR_WORKSPACE_BYTES = 8 << 20  # packed weights unpacked at a time
UNPACKED_BYTES = 2 << 26  # of one matrix at a time on a GPU, in bfloat16, and its product
DRIVER_BYTES = 1 << 30  # of a GPU's memory, for its libraries and for what the allocator cannot use
KV_ROWS = 16  # rows of the KV that begin on a boundary for wide loads, in any type
