"""What a job is started by: each backend turns a Job into a Script."""
