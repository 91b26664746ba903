//! A tensor in a mapped file: its bytes, and how they become numbers.

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0,
};
use candle_core::quantized::{GgmlDType, GgmlType};
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::ops::MatrixRows;
use crate::{Error, Result};

/// Numbers that are decoded at a time where a copy of them is needed: a multiple of every block.
const CHUNK: usize = 256;

/// Turns the bytes of whole blocks into numbers.
type Decode = fn(&[u8], &mut [f32]);

/// A tensor in a mapped file, every row of it made of whole blocks.
pub(super) struct Stored<'a> {
    bytes: &'a [u8],
    dtype: GgmlDType,
    decode: Decode,
    shape: &'a [usize],
    /// Rows of a head that are permuted, if any are.
    head_rows: Option<usize>,
}

impl<'a> Stored<'a> {
    /// A tensor of `shape` in `bytes`; nothing if its type cannot be read.
    pub fn new(bytes: &'a [u8], dtype: GgmlDType, shape: &'a [usize]) -> Option<Self> {
        Some(Stored { bytes, dtype, decode: decoder(dtype)?, shape, head_rows: None })
    }

    /// The same tensor [heads · d, in] or bias [heads · d], whose rows the file has in the order
    /// for rotating neighbours, in the order for rotating halves.
    ///
    /// # Errors
    /// If the rows are not those of so many heads.
    pub fn permuted(self, heads: usize) -> Result<Self> {
        let rows = self.shape.first().copied().unwrap_or(1);
        let head_rows = rows / heads;
        if head_rows * heads != rows || !head_rows.is_multiple_of(2) {
            return Err(Error::failure(format!(
                "{rows} rows do not divide into {heads} even heads"
            )));
        }
        Ok(Stored { head_rows: Some(head_rows), ..self })
    }

    /// All of it: bf16 as bf16, everything else as f32.
    pub fn tensor(&self) -> Result<Tensor> {
        let (shape, cpu) = (self.shape, &Device::Cpu);
        let tensor = if self.dtype == GgmlDType::BF16 {
            Tensor::from_raw_buffer(self.bytes, DType::BF16, shape, cpu)?
        } else {
            let mut values = vec![0.0; shape.iter().product()];
            (self.decode)(self.bytes, &mut values);
            Tensor::from_vec(values, shape, cpu)?
        };
        if self.head_rows.is_none() {
            return Ok(tensor);
        }
        let rows = (0..shape[0]).map(|row| self.place(row) as u32);
        Ok(tensor.index_select(&Tensor::from_iter(rows, cpu)?, 0)?)
    }

    /// Which row of the file is row `i`: of a permuted head of d rows, s · d/2 + j is 2j + s.
    fn place(&self, i: usize) -> usize {
        self.head_rows.map_or(i, |d| {
            let (first, s, j) = (i - i % d, i % d / (d / 2), i % (d / 2));
            first + 2 * j + s
        })
    }

    /// The bytes of row `i` of a matrix.
    fn row(&self, i: usize) -> &'a [u8] {
        let length = self.bytes_of(self.shape[1]);
        &self.bytes[self.place(i) * length..][..length]
    }

    fn bytes_of(&self, elements: usize) -> usize {
        elements / self.dtype.block_size() * self.dtype.type_size()
    }
}

impl MatrixRows for Stored<'_> {
    fn dims(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1])
    }

    fn read_f32(&self, i: usize, into: &mut [f32]) {
        (self.decode)(self.row(i), into);
    }

    fn read_bf16(&self, i: usize, into: &mut [bf16]) {
        let row = self.row(i);
        if self.dtype == GgmlDType::BF16 {
            let values = row.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes));
            return into.iter_mut().zip(values).for_each(|(to, x)| *to = x);
        }
        let mut values = [0.0; CHUNK];
        for (to, from) in into.chunks_mut(CHUNK).zip(row.chunks(self.bytes_of(CHUNK))) {
            let values = &mut values[..to.len()];
            (self.decode)(from, values);
            to.convert_from_f32_slice(values);
        }
    }
}

/// How numbers of a type are decoded, if they can be.
fn decoder(dtype: GgmlDType) -> Option<Decode> {
    Some(match dtype {
        GgmlDType::F32 => floats,
        GgmlDType::F16 => halves,
        GgmlDType::BF16 => brain_floats,
        GgmlDType::Q4_0 => blocks::<BlockQ4_0>,
        GgmlDType::Q4_1 => blocks::<BlockQ4_1>,
        GgmlDType::Q5_0 => blocks::<BlockQ5_0>,
        GgmlDType::Q5_1 => blocks::<BlockQ5_1>,
        GgmlDType::Q8_0 => blocks::<BlockQ8_0>,
        GgmlDType::Q2K => blocks::<BlockQ2K>,
        GgmlDType::Q3K => blocks::<BlockQ3K>,
        GgmlDType::Q4K => blocks::<BlockQ4K>,
        GgmlDType::Q5K => blocks::<BlockQ5K>,
        GgmlDType::Q6K => blocks::<BlockQ6K>,
        GgmlDType::Q8_1 | GgmlDType::Q8K => return None,
    })
}

fn floats(bytes: &[u8], into: &mut [f32]) {
    let values = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    into.iter_mut().zip(values).for_each(|(to, x)| *to = x);
}

fn halves(bytes: &[u8], into: &mut [f32]) {
    let mut halves = [f16::ZERO; CHUNK];
    for (to, from) in into.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
        let values = from.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes));
        halves.iter_mut().zip(values).for_each(|(to, x)| *to = x);
        halves[..to.len()].convert_to_f32_slice(to);
    }
}

fn brain_floats(bytes: &[u8], into: &mut [f32]) {
    let values = bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32());
    into.iter_mut().zip(values).for_each(|(to, x)| *to = x);
}

/// Quantised blocks, as llama.cpp dequantises them; a GGUF file has them at multiples of 4 bytes.
fn blocks<T: GgmlType>(bytes: &[u8], into: &mut [f32]) {
    // SAFETY: a block is integers and half floats, of which all bits are valid.
    let (_, blocks, _) = unsafe { bytes.align_to::<T>() };
    T::to_float(blocks, into);
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::quantized::ggml_file::qtensor_from_ggml;

    use super::*;
    use crate::kernels::pack::PackedMatrix;
    use crate::kernels::testing::{noise, packed_bits};

    const QUANTISED: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    const PLAIN: [GgmlDType; 3] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// What is packed row by row has the bits of `whole`, the matrix in one piece, packed.
    fn assert_packs_as(stored: &Stored, whole: &[f32], what: &str) {
        let (out, in_) = stored.dims();
        let rows = PackedMatrix::f32_rows(out, in_, |i, row| stored.read_f32(i, row));
        let expected = PackedMatrix::from_f32(whole, out, in_);
        assert!(packed_bits(&rows) == packed_bits(&expected), "{what} as f32");
        let rows = PackedMatrix::bf16_rows(out, in_, |i, row| stored.read_bf16(i, row));
        let expected = PackedMatrix::from_f32_as_bf16(whole, out, in_);
        assert!(packed_bits(&rows) == packed_bits(&expected), "{what} as bf16");
    }

    #[test]
    fn every_type_packs_as_candle_reads_it_at_odd_shapes() {
        let blocks = QUANTISED.map(|dtype| (dtype, vec![(1, 1), (17, 3), (35, 9)]));
        let plain = PLAIN.map(|dtype| (dtype, vec![(1, 1), (17, 7), (35, 257), (100, 700)]));
        for (dtype, shapes) in blocks.into_iter().chain(plain) {
            for (out, in_blocks) in shapes {
                let shape = [out, in_blocks * dtype.block_size()];
                let numbers = noise(out as u64, shape[0] * shape[1]);
                let tensor = Tensor::from_vec(numbers, &shape[..], &Device::Cpu).unwrap();
                let quantised = QTensor::quantize(&tensor, dtype).unwrap();
                let bytes = quantised.data().unwrap();
                let read = qtensor_from_ggml(dtype, &bytes, shape.to_vec(), &Device::Cpu).unwrap();
                let whole = values(&read.dequantize(&Device::Cpu).unwrap());
                let stored = Stored::new(&bytes, dtype, &shape).unwrap();
                let what = format!("{dtype:?} {shape:?}");
                assert!(values(&stored.tensor().unwrap()) == whole, "{what}");
                assert_packs_as(&stored, &whole, &what);
            }
        }
        assert!(Stored::new(&[], GgmlDType::Q8_1, &[0, 0]).is_none());
    }

    #[test]
    fn plain_numbers_may_begin_at_any_byte() {
        let (shape, numbers) = ([19, 5], noise(3, 95));
        let bytes = [&[7][..], &numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()];
        let stored = bytes.concat();
        assert_packs_as(&Stored::new(&stored[1..], GgmlDType::F32, &shape).unwrap(), &numbers, "");
    }

    #[test]
    fn bf16_is_kept_to_the_bit_even_where_it_is_no_number() {
        let bits = [0x7f81u16, 0xff80, 0x8000, 0x0001, 0x3f80];
        let bytes: Vec<u8> = bits.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut row = [bf16::ZERO; 5];
        Stored::new(&bytes, GgmlDType::BF16, &[1, 5]).unwrap().read_bf16(0, &mut row);
        assert_eq!(row.map(bf16::to_bits), bits);
    }

    #[test]
    fn permuted_heads_are_put_back() {
        let (shape, heads, numbers) = ([36, 3], 2, noise(5, 108));
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let whole = Tensor::from_vec(numbers, (heads, 9, 2, 3), &Device::Cpu).unwrap();
        let whole = values(&whole.transpose(1, 2).unwrap().contiguous().unwrap());
        let stored = Stored::new(&bytes, GgmlDType::F32, &shape).unwrap().permuted(heads).unwrap();
        assert_packs_as(&stored, &whole, "permuted");
        assert_eq!(values(&stored.tensor().unwrap()), whole);
        let uneven = Stored::new(&bytes, GgmlDType::F32, &shape).unwrap().permuted(4);
        let error = uneven.err().unwrap().to_string();
        assert_eq!(error, "36 rows do not divide into 4 even heads");
    }
}
