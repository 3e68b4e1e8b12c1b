"""Runs at fixed times: crontab lines, systemd timers and Kubernetes CronJobs."""
