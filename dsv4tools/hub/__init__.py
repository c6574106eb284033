"""The Hugging Face Hub: what a repository holds at a commit, fetching it, and checking every byte that came.

huggingface_hub does the talking (it is imported with the first call). Over plain HTTP it checks no more than the size
of a file; here every file is compared with the hash that the Hub states for it.
"""

from dsv4tools.hub.download import Download, DownloadPlan, download, plan_download
from dsv4tools.hub.snapshot import RemoteFile, Snapshot, list_snapshot

__all__ = ["Download", "DownloadPlan", "RemoteFile", "Snapshot", "download", "list_snapshot", "plan_download"]
