"""Pure tensor functions: no classes with hidden state, no models, no logging."""
