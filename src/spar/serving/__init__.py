"""The server: an API in OpenAI's shapes over one pipeline. It needs the extra `serve`."""
