"""Inside a job: the driver, its ranks, and what watches them."""
