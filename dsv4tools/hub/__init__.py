"""The Hugging Face Hub: what a repository holds at a commit, fetching it, and checking every byte that came.

huggingface_hub does the talking (it is imported with the first call). Over plain HTTP it checks no more than the size
of a file; here every file is compared with the hash that the Hub states for it.
"""

from dsv4tools.hub.download import Download, DownloadPlan, download, plan_download
from dsv4tools.hub.reference import HubReference, is_reference, parse_reference
from dsv4tools.hub.remote import RemoteShard, open_remote
from dsv4tools.hub.snapshot import RemoteFile, Snapshot, list_snapshot

__all__ = [
    "Download", "DownloadPlan", "HubReference", "RemoteFile", "RemoteShard", "Snapshot", "download", "is_reference",
    "list_snapshot", "open_remote", "parse_reference", "plan_download",
]
