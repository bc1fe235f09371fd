"""The most that a file may make this library do, in one place.

A number in a file decides how much is read, built or unpacked, so every reader compares it with a bound first. Bounds
are far above what real files hold and far below what fills a memory; beside each stands what it is measured against.
"""

# Files of plain data, which are read whole.
MAX_CONFIG_BYTES = 1_000_000  # config.json and its like; published ones are below 10 kB
MAX_INDEX_BYTES = 64_000_000  # index.json of shards; about 40 bytes a shard
MAX_RUN_FILE_BYTES = 32_000  # a run's YAML; those of the paper are below 3 kB
MAX_LINE_BYTES = 64_000  # a line of metadata.jsonl, and the .json of a pair
MAX_YAML_VALUES = 10_000  # of a run's YAML once its aliases are written out, which can multiply without end

# Files of tensors.
MAX_HEADER_BYTES = 10_000_000  # of a .safetensors; that of SD1.5's U-Net has 90 kB
MAX_TENSORS = 10_000  # of one file; a whole fine-tuned checkpoint has 2,000
MAX_PICKLE_BYTES = 64_000_000  # of the pickle inside a torch file, which names tensors and holds no data

MAX_PREVIEW_BYTES = 100_000  # of the small picture in a subject's header; ours have 5 to 30 kB
MAX_PREVIEW_EDGE = 1_024  # pixels; 256

MAX_DOWNLOAD_BYTES = 10**11  # of one file of the Hub; the published ones have up to 3.4 GB
MAX_JPEG_SCANS = 100  # passes over an image; a progressive JPEG has about ten, and each costs a decoder the whole image

# Sizes of a network. Each is also compared with the tensors of its file.
MAX_WIDTH = 16_384  # the published encoder's widest layer has 4,096
MAX_LAYERS = 64  # and 23 blocks
MAX_HEADS = 256  # and 16 heads
MAX_VOCABULARY = 1_000_000  # CLIP's has 49,408 tokens
MAX_POSITIONS = 65_536  # BERT's has 512
MAX_IMAGE_SIZE = 4_096  # pixels of an edge; 224

# Training pairs, whose shards may be compressed and may come from a server.
MAX_PAIR_FILE_BYTES = 64_000_000  # an image; photographs have 1 to 10 MB
MAX_PAIR_PIXELS = 50_000_000  # of one image; ours have 260,000
MAX_PAIR_FILES = 16  # of one pair, which needs three
MAX_SHARDS = 1_000_000  # of one pattern: {0..999999999} would fill the memory with names
MAX_COUNT = 10**12  # of pairs, steps and so on: what a counter can mean
