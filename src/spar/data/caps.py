"""How much a data set may ask of us: every cap in one place. Pictures have theirs in `images` (bytes, pixels)."""

MAX_SHARDS = 100_000  # files that one pattern may name
MAX_MEMBERS = 4_000_000  # members of one tar
MAX_EXTENDED_HEADER = 2**20  # bytes of a tar's long name or pax record
MAX_TEXT_BYTES = 2**20  # a caption, a json member, a line of metadata.jsonl
MAX_INPUT_IMAGES = 8  # references of one edit
MAX_ANNOTATION_BYTES = 4 * 2**30  # a JSON list of samples, which is parsed in memory
MAX_ROW_GROUP_BYTES = 4 * 2**30  # a parquet row group, which is read in whole
