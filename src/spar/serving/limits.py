"""Limits of one request and of all requests together, which `spar serve --help` lists.

The model's own limits apply too: tokens of a prompt, twice the trained side.
"""

from spar.common.limits import MAX_NEW_TOKENS

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
PAGE_PATH = "/page"
TOKEN_VARIABLE = "SPAR_API_TOKEN"
MIN_TOKEN_CHARACTERS = 16

# One request
MAX_BODY_BYTES = 24 * 2**20
MAX_UPLOAD_BYTES = 16 * 2**20
MAX_UPLOAD_PIXELS = 16 * 10**6
MAX_PROMPT_CHARACTERS = 8192
MAX_FIELDS = 64  # of one JSON object
MAX_VALUES = 100_000  # of one JSON body: parsed, they take twenty times their bytes
MAX_N = 8
MAX_PARTIAL_IMAGES = 32
MAX_STEPS = 100
MAX_GUIDANCE = 30
MAX_OUTPUT_PIXELS = 4 * 2**20
MAX_MESSAGES = 64
MAX_PARTS = 16
MAX_CHAT_IMAGES = 8
MAX_ANSWER_TOKENS = MAX_NEW_TOKENS

# Time
HEADER_SECONDS = 15
BODY_SECONDS = 30
READ_SECONDS = 30
ANSWER_SECONDS = 300
REQUEST_SECONDS = 120
SHUTDOWN_SECONDS = 30
RETRY_SECONDS = 2  # Retry-After of a refused request

# All requests together
MAX_CONNECTIONS = 1024  # at most as many as there are file handles, without SPARE_FILES
SPARE_FILES = 256
ACCEPTED_AT_ONCE = 64  # connections, before those too many are closed
MAX_REQUESTS = 256
MAX_BUFFERED_BYTES = 512 * 2**20
JSON_COPIES = 4  # of a body: its bytes, their text, the parsed text, what a data URL holds
FORM_COPIES = 2  # its bytes, and the file that is read
PIXEL_BYTES = 4  # of a decoded image
OPAQUE_BYTES = 13  # of a pixel while it is decoded: the file's colours, those of sRGB, turned (measured by a test)
TRANSPARENT_BYTES = 26  # with an alpha channel, which is laid on white, or in a WEBP, whose decoder holds two copies
FILE_BYTES = {"png": 4, "jpeg": 2, "webp": 2}  # of a pixel of a made image's file at most (measured by a test)
WEBP_BYTES = 28  # of a pixel while it is encoded, beside
MAX_UNREAD = 3  # previews that wait for the client of a stream; a further one replaces the oldest
MAX_QUEUE = 64
MAX_BATCH = 8
MAX_CHATS = 8
CHAT_TURN_TOKENS = 8
GATHER_SECONDS = 0.03
DECODE_THREADS = 2  # images decoded at once

_MIB = 2**20
LIMITS = (
    ("MAX_BODY_BYTES", f"{MAX_BODY_BYTES // _MIB} MiB", "body of a request, counted while it arrives"),
    ("MAX_UPLOAD_BYTES", f"{MAX_UPLOAD_BYTES // _MIB} MiB", "file of an image"),
    ("MAX_UPLOAD_PIXELS", f"{MAX_UPLOAD_PIXELS / 1e6:g} million", "pixels of an image, by its header"),
    ("MAX_PROMPT_CHARACTERS", MAX_PROMPT_CHARACTERS, "characters of a text; the model also limits its tokens"),
    ("MAX_FIELDS", MAX_FIELDS, "fields of a JSON object"),
    ("MAX_VALUES", MAX_VALUES, "values of a JSON body, counted by commas"),
    ("MAX_N", MAX_N, "images of a request (n)"),
    ("MAX_PARTIAL_IMAGES", MAX_PARTIAL_IMAGES, "previews of a streamed image (partial_images)"),
    ("MAX_UNREAD", MAX_UNREAD, "previews that wait for their client; a further one replaces the oldest"),
    ("MAX_STEPS", MAX_STEPS, "sampling steps (num_inference_steps)"),
    ("MAX_GUIDANCE", MAX_GUIDANCE, "guidance_scale"),
    ("MAX_OUTPUT_PIXELS", f"{MAX_OUTPUT_PIXELS / 2**20:g} x 1024 x 1024", "pixels of a generated image (size); "
     "each side at most twice the model's own"),
    ("MAX_MESSAGES", MAX_MESSAGES, "messages of a chat"),
    ("MAX_PARTS", MAX_PARTS, "parts of a message"),
    ("MAX_CHAT_IMAGES", MAX_CHAT_IMAGES, "images of a chat"),
    ("MAX_ANSWER_TOKENS", MAX_ANSWER_TOKENS, "tokens of an answer (max_completion_tokens); more is cut to that"),
    ("HEADER_SECONDS", HEADER_SECONDS, "seconds that a request's head may take to arrive"),
    ("BODY_SECONDS", BODY_SECONDS, "seconds that its body may take"),
    ("READ_SECONDS", READ_SECONDS, "seconds that a client may stop reading an answer"),
    ("ANSWER_SECONDS", ANSWER_SECONDS, "seconds that it may take to read what there is of an answer"),
    ("REQUEST_SECONDS", REQUEST_SECONDS, "seconds from then to the answer (--timeout)"),
    ("SHUTDOWN_SECONDS", SHUTDOWN_SECONDS, "seconds that running requests get when the server stops"),
    ("MAX_CONNECTIONS", MAX_CONNECTIONS, "connections at once; then the one that has waited longest is closed"),
    ("MAX_REQUESTS", MAX_REQUESTS, "requests at once, without those of `/health`"),
    ("MAX_BUFFERED_BYTES", f"{MAX_BUFFERED_BYTES // _MIB} MiB", "memory that bodies and images of all requests take, "
     "given and made"),
    ("MAX_QUEUE", MAX_QUEUE, "images and chats that wait (--max-queue)"),
    ("MAX_BATCH", MAX_BATCH, "images of the model's own size in one batch (--max-batch)"),
    ("MAX_CHATS", MAX_CHATS, "chats answered in turns"),
)  # fmt: skip


def format_limits() -> str:
    """Format the limits as a list for `--help`."""
    return "\n".join(f"- {name} = {value}: {what}" for name, value, what in LIMITS)
