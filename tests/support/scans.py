"""DICOM, NIfTI and GeoTIFF files, written by pydicom, nibabel and tifffile."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np


def write_dicom(path, values, *, bits=None, patient="", study="", **tags):
    """Writes gray ``[height, width]`` or ``[frames, height, width]``, with further tags by name."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    values = np.asarray(values)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    data.PatientName, data.PatientBirthDate = "Doe^Jane", "19700101"
    data.PatientID, data.Modality = patient, "OT"
    if study:
        data.StudyInstanceUID = study
    data.PhotometricInterpretation = "MONOCHROME2"
    data.SamplesPerPixel = 1
    data.Rows, data.Columns = values.shape[-2:]
    if values.ndim == 3:
        data.NumberOfFrames = len(values)
    data.BitsAllocated = 8 * values.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    pixels = np.ascontiguousarray(values).tobytes()
    data.PixelData = pixels + b"\0" * (len(pixels) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def bundled(name) -> Path:
    """The path of a file that pydicom ships."""
    from pydicom.data import get_testdata_file

    return Path(get_testdata_file(name, download=False))


def geotiff(values, *, nodata=None, items="", **options) -> bytes:
    """A GeoTIFF of ``[height, width, bands]`` or, with planarconfig "separate", bands first."""
    import tifffile

    tags = []
    if nodata is not None:
        tags.append((42113, 2, 0, str(nodata), True))
    if items:
        tags.append((42112, 2, 0, f"<GDALMetadata>{items}</GDALMetadata>", True))
    options = {"photometric": "minisblack", "metadata": None, **options}
    file = io.BytesIO()
    tifffile.imwrite(file, values, extratags=tags, **options)
    return file.getvalue()


def band_items(name, texts) -> str:
    """Entries of GDAL's metadata, one for each band."""
    return "".join(
        f'<Item name="{name}" sample="{i}" role="{name.lower()}">{text}</Item>'
        for i, text in enumerate(texts)
    )


def nifti(suffix: str = ".nii") -> bytes:
    """A small NIfTI volume, compressed with the suffix ".nii.gz"."""
    import gzip

    import nibabel

    values = np.arange(5 * 7 * 4, dtype=np.int16).reshape(5, 7, 4)
    data = nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    return gzip.compress(data) if suffix.endswith(".gz") else data


def traces_of(identifiers, folder):
    """What lies in a folder of identifiers, as they are or as an unsalted digest: (file, text)."""
    texts = {}
    for each in map(str, identifiers):
        texts[each.encode()] = each
        for name in ("sha256", "sha1", "md5", "blake2b"):
            digest = hashlib.new(name, each.encode())
            texts[digest.digest()[:8]] = texts[digest.hexdigest()[:12].encode()] = f"{name} {each}"
    found = set()
    for path in filter(Path.is_file, Path(folder).rglob("*")):
        contents = [str(path).encode(), path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += map(archive.read, archive.namelist())
        for content in contents:
            found |= {(path.name, text) for trace, text in texts.items() if trace in content}
    return found
