"""What leaves the machine: a merged model, a GGUF file, an upload to the Hub."""
