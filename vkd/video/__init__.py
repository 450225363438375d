"""Reading videos: where their bytes are, what their headers say, and which frame is shown when."""
