"""How the next token is chosen: what a user asks for (`params`) and the program (`sampler`)."""
