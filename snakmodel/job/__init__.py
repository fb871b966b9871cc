"""Everything that runs inside a job: the driver, its ranks with their supervisors, and the watchdog over them."""
