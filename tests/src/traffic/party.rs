//! The calls of writers and readers. Each is recorded before it is sent and when it is answered.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use qpq_domain::{MessageId, Seq, StoreId};
use qpq_proto::{
    Method,
    methods::{Ack, BatchEnqueue, Enqueue, FetchWait, Peek},
    v1,
};
use qpq_test_services::history::{Edge, Recorder, Sending, Tag};
use rand::{Rng as _, rngs::StdRng, seq::SliceRandom as _};
use tokio::{sync::watch, time::sleep};

use super::{IDLE, LIST, Outgoing, Reader, State, WAIT, seen, store_id, streams};
use crate::{
    accounts::Account,
    client::Client,
    roaming::{CallOutcome, Loss, Roamer, call_on},
};

/// A writer or reader.
pub(super) struct Party {
    pub(super) recorder: Recorder,
    pub(super) roamer: Roamer,
    pub(super) random: StdRng,
    pub(super) state: Arc<State>,
}

impl Party {
    pub(super) async fn write(mut self) {
        while !self.state.is_enough() {
            if self.random.gen_range(0..10) >= self.state.plan.batches {
                let inbox = self.some_inbox();
                let message = self.state.outgoing(inbox, &mut self.random);
                self.send_one(message).await;
            } else if self.random.r#gen() {
                let count = self.random.gen_range(LIST);
                let inboxes: Vec<usize> = (0..count).map(|_| self.some_inbox()).collect();
                let messages = inboxes
                    .into_iter()
                    .map(|inbox| self.state.outgoing(inbox, &mut self.random))
                    .collect();
                self.send_list(messages).await;
            } else {
                self.fan_out().await;
            }
            if self.random.gen_ratio(1, 300) {
                self.roamer.leave();
            }
        }
    }

    fn some_inbox(&mut self) -> usize {
        self.random.gen_range(0..self.state.accounts.len())
    }

    fn token(&mut self) -> Bytes {
        let any = self.some_inbox();
        self.state.accounts[any].token.clone()
    }

    fn edge(&self) -> Edge {
        Edge(u16::try_from(self.roamer.edge()).unwrap_or(u16::MAX))
    }

    /// Calls a method. Only an answer, a temporary refusal or a lost connection are allowed.
    pub(super) async fn call<M: Method>(
        &mut self,
        request: &M::Request,
        token: &Bytes,
    ) -> Option<M::Response> {
        let client = self.roamer.connected().await;
        self.call_on::<M>(&client, request, token).await
    }

    pub(super) async fn call_on<M: Method>(
        &mut self,
        client: &Client,
        request: &M::Request,
        token: &Bytes,
    ) -> Option<M::Response> {
        self.state.calls.fetch_add(1, Ordering::Relaxed);
        match call_on::<M>(client, request, Some(token)).await {
            CallOutcome::Ok(response) => return Some(response),
            CallOutcome::Refused(refused) if refused.is_temporary() => {
                self.state.refused.fetch_add(1, Ordering::Relaxed);
                self.roamer.pause().await;
            }
            CallOutcome::Refused(refused) => panic!("{} is refused: {refused:?}", M::INFO.name),
            CallOutcome::Lost(Loss::Drained) => {
                self.state.drained.fetch_add(1, Ordering::Relaxed);
            }
            CallOutcome::Lost(Loss::Failed(error)) => {
                self.state.lost.lock().push(format!("{}: {error}", M::INFO.name));
            }
        }
        None
    }

    async fn send_one(&mut self, message: Outgoing) {
        let token = self.token();
        let request = request(&message, &self.state.accounts);
        loop {
            self.roamer.connected().await;
            let sendings = self.sending(message.inbox, message.id, message.tag);
            if let Some(response) = self.call::<Enqueue>(&request, &token).await {
                self.acknowledged(sendings, Seq(response.seq));
                self.state.acknowledged.send_modify(|count| *count += 1);
                return;
            }
        }
    }

    async fn send_list(&mut self, mut messages: Vec<Outgoing>) {
        let token = self.token();
        while !messages.is_empty() {
            let request = v1::BatchEnqueueRequest {
                messages: messages
                    .iter()
                    .map(|message| request(message, &self.state.accounts))
                    .collect(),
                ..Default::default()
            };
            let inboxes: Vec<usize> = messages.iter().map(|message| message.inbox).collect();
            let ids: Vec<_> = messages.iter().map(|message| (message.id, message.tag)).collect();
            let accepted =
                self.send_batch(request, &token, inboxes.into_iter().zip(ids).collect()).await;
            let mut accepted = accepted.into_iter();
            messages.retain(|_| !accepted.next().unwrap_or(false));
        }
    }

    /// Sends one payload to every inbox.
    async fn fan_out(&mut self) {
        let token = self.token();
        let Outgoing { id, tag, payload, .. } = self.state.outgoing(0, &mut self.random);
        let mut inboxes: Vec<usize> = (0..self.state.accounts.len()).collect();
        inboxes.shuffle(&mut self.random);
        while !inboxes.is_empty() {
            let request = v1::BatchEnqueueRequest {
                recipient_keys: inboxes
                    .iter()
                    .map(|i| self.state.accounts[*i].identity.clone())
                    .collect(),
                payload: payload.clone(),
                message_id: Bytes::copy_from_slice(id.as_bytes()),
                ..Default::default()
            };
            let messages = inboxes.iter().map(|inbox| (*inbox, (id, tag))).collect();
            let mut accepted = self.send_batch(request, &token, messages).await.into_iter();
            inboxes.retain(|_| !accepted.next().unwrap_or(false));
        }
    }

    /// Sends a batch. Returns for each message whether it was acknowledged.
    async fn send_batch(
        &mut self,
        request: v1::BatchEnqueueRequest,
        token: &Bytes,
        messages: Vec<(usize, (MessageId, Tag))>,
    ) -> Vec<bool> {
        self.roamer.connected().await;
        let sendings: Vec<_> =
            messages.into_iter().map(|(inbox, (id, tag))| self.sending(inbox, id, tag)).collect();
        let Some(response) = self.call::<BatchEnqueue>(&request, token).await else {
            return vec![false; sendings.len()];
        };
        assert_eq!(response.results.len(), sendings.len(), "a result for each message");
        let mut accepted = Vec::new();
        for (sending, result) in sendings.into_iter().zip(&response.results) {
            accepted.push(result.status == 0);
            if result.status == 0 {
                self.acknowledged(sending, Seq(result.seq));
            } else {
                assert!(result.status == 9, "a message of a batch is refused: {result:?}");
            }
        }
        let count = accepted.iter().filter(|accepted| **accepted).count() as u64;
        self.state.acknowledged.send_modify(|all| *all += count);
        accepted
    }

    /// Records the start of an Enqueue, for each stream of the inbox.
    fn sending(&mut self, inbox: usize, id: MessageId, tag: Tag) -> Vec<Sending> {
        let edge = self.edge();
        streams(inbox).map(|stream| self.recorder.sending(stream, id, tag, edge)).collect()
    }

    fn acknowledged(&mut self, sendings: Vec<Sending>, seq: Seq) {
        for sending in sendings {
            self.recorder.acknowledged(sending, seq);
        }
    }

    pub(super) async fn drain(mut self, reader: Reader) {
        let Reader { stream, token, .. } = reader;
        while !self.state.stopped() {
            let request = v1::FetchWaitRequest {
                timeout_ms: WAIT.as_millis() as u64,
                limit: self.random.gen_range(0..150),
                all_channels: true,
                ..Default::default()
            };
            let client = self.roamer.connected().await;
            self.state.note_reader(client);
            let reading = self.recorder.reading(stream);
            if let Some(response) = self.call::<FetchWait>(&request, &token).await {
                let store = store_id(&response.store_id);
                self.recorder.delivered_in(store, reading, seen(&response.payloads));
            }
            // So that the next read has more than one message.
            sleep(IDLE.mul_f64(self.random.r#gen())).await;
        }
    }

    pub(super) async fn peek_and_ack(mut self, reader: Reader) {
        while !self.state.stopped() {
            let limit = self.random.gen_range(1..150);
            let Some(page) = self.peek(&reader, limit).await else {
                sleep(IDLE.mul_f64(self.random.r#gen())).await;
                continue;
            };
            let request = if self.random.r#gen() {
                v1::AckRequest { seq_up_to: page.last, all_channels: true, ..Default::default() }
            } else {
                let seqs = page.seqs.iter().copied().filter(|_| self.random.r#gen()).collect();
                v1::AckRequest { seqs, all_channels: true, ..Default::default() }
            };
            self.ack(&reader, &page, &request).await;
            sleep(IDLE.mul_f64(self.random.r#gen())).await;
        }
    }

    /// Reads without removing. Returns the page unless it is empty or there was no answer.
    async fn peek(&mut self, reader: &Reader, limit: u32) -> Option<Page> {
        let request = v1::PeekRequest { limit, all_channels: true, ..Default::default() };
        let client = self.roamer.connected().await;
        self.state.note_reader(client.clone());
        let reading = self.recorder.reading(reader.stream);
        let response = self.call_on::<Peek>(&client, &request, &reader.token).await?;
        let store = store_id(&response.store_id);
        self.recorder.delivered_in(store, reading, seen(&response.payloads));
        let seqs: Vec<_> = response.payloads.iter().map(|envelope| envelope.seq).collect();
        Some(Page { store, last: *seqs.last()?, seqs, client })
    }

    /// Acks messages of a page, and retries until that is answered or the connection ends.
    async fn ack(&mut self, reader: &Reader, page: &Page, request: &v1::AckRequest) {
        let inbox = reader.stream;
        while page.client.ended().is_none() {
            let acking = match request.seq_up_to {
                0 => {
                    let seqs = request.seqs.iter().copied().map(Seq);
                    self.recorder.acking_in(page.store, inbox, seqs)
                }
                seq => self.recorder.acking_through_in(page.store, inbox, Seq(seq)),
            };
            if self.call_on::<Ack>(&page.client, request, &reader.token).await.is_some() {
                return self.recorder.acked(acking);
            }
        }
    }

    /// Reads and acks all messages until `emptied` is set.
    pub(super) async fn sweep(mut self, reader: Reader, emptied: watch::Receiver<bool>) {
        while !*emptied.borrow() {
            match self.peek(&reader, 0).await {
                Some(page) => {
                    let request = v1::AckRequest {
                        seq_up_to: page.last,
                        all_channels: true,
                        ..Default::default()
                    };
                    self.ack(&reader, &page, &request).await;
                }
                None => sleep(IDLE).await,
            }
        }
    }
}

/// Messages that were read, to be acked.
struct Page {
    store: StoreId,
    seqs: Vec<u64>,
    last: u64,
    /// The connection of the read. An ack on another one could remove other messages: only here the
    /// server knows the history of the store that the seqs belong to.
    client: Client,
}

fn request(message: &Outgoing, accounts: &[Account]) -> v1::EnqueueRequest {
    v1::EnqueueRequest {
        recipient_key: accounts[message.inbox].identity.clone(),
        payload: message.payload.clone(),
        message_id: Bytes::copy_from_slice(message.id.as_bytes()),
        ..Default::default()
    }
}
