"""Pages made of what runs wrote: curves as one HTML page, the mismatch report, the environment check."""
