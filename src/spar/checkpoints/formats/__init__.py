"""Published formats: where their files lie, what their configurations say, and what their tensors are called here."""
